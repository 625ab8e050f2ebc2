// What an API says about itself, to anybody: its OpenAPI document, and Swagger UI from our own origin. No page of it runs a
// script from elsewhere or one that stands in the page.
import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { Hono } from "hono";
import { type ApiDescription, openApiDocument } from "./openapi.ts";

const ASSETS: Record<string, string> = {
  "swagger-ui.css": "text/css; charset=utf-8",
  "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
};

/** `openapi.json`, `openapi.yaml` and `docs` below the API's base path. */
export function describedBy(api: ApiDescription): Hono {
  const app = new Hono().basePath(api.base);
  let document: Record<string, unknown> | null = null;
  const made = () => {
    document ??= openApiDocument(api);
    return document;
  };
  app.get("/openapi.json", (c) => c.json(made()));
  app.get("/openapi.yaml", (c) =>
    c.body(Bun.YAML.stringify(made(), null, 2), 200, { "Content-Type": "application/yaml" }),
  );
  app.get("/docs", (c) => {
    c.header("Content-Security-Policy", POLICY);
    return c.html(page(api));
  });
  app.get("/docs/start.js", (c) => c.body(start(api), 200, { "Content-Type": "text/javascript; charset=utf-8" }));
  for (const [name, type] of Object.entries(ASSETS))
    app.get(`/docs/${name}`, (c) =>
      c.body(asset(name), 200, { "Content-Type": type, "Cache-Control": "public, max-age=86400" }),
    );
  return app;
}

/** Swagger UI sets styles at run time and draws its icons from data URLs. */
const POLICY =
  "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'";

function page({ base, title }: ApiDescription): string {
  return `<!doctype html>
<html lang="en">
  <head>
    <meta charset="utf-8">
    <meta name="viewport" content="width=device-width, initial-scale=1">
    <title>${title}</title>
    <link rel="icon" href="data:,">
    <link rel="stylesheet" href="${base}/docs/swagger-ui.css">
  </head>
  <body>
    <div id="ui"></div>
    <script src="${base}/docs/swagger-ui-bundle.js"></script>
    <script src="${base}/docs/start.js"></script>
  </body>
</html>
`;
}

function start({ base }: ApiDescription): string {
  return `SwaggerUIBundle({ url: "${base}/openapi.json", dom_id: "#ui", validatorUrl: null });\n`;
}

const contents = new Map<string, Uint8Array<ArrayBuffer>>();

function asset(name: string): Uint8Array<ArrayBuffer> {
  let bytes = contents.get(name);
  if (!bytes) {
    const folder = dirname(fileURLToPath(import.meta.resolve("swagger-ui-dist/package.json")));
    bytes = new Uint8Array(readFileSync(join(folder, name)));
    contents.set(name, bytes);
  }
  return bytes;
}
