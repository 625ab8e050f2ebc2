// What all pages share: one frame without script or anything from elsewhere, and headers that hold browsers to that.
import { createHash } from "node:crypto";
import type { Context, MiddlewareHandler } from "hono";
import { html, raw } from "hono/html";
import type { ContentfulStatusCode } from "hono/utils/http-status";

export type Html = ReturnType<typeof html>;

const STYLE = `
:root { color-scheme: light dark; --line: #8884; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 40rem; margin: 10vh auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; }
pre { padding: .8rem 1rem; border: 1px solid var(--line); border-radius: .4rem; overflow-x: auto; user-select: all; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; }
dt { opacity: .7; } dd { margin: 0; overflow-wrap: anywhere; }
a.button, button { display: inline-block; font: inherit; padding: .5rem 1.2rem; margin: .3rem .5rem .3rem 0;
  border: 1px solid var(--line); border-radius: .4rem; background: none; color: inherit; text-decoration: none; cursor: pointer; }
button.main { background: #2457d6; border-color: #2457d6; color: #fff; }
`;

const POLICY = [
  "default-src 'none'",
  `style-src 'sha256-${createHash("sha256").update(STYLE).digest("base64")}'`,
  "form-action 'self'",
  "base-uri 'none'",
  "frame-ancestors 'none'",
].join("; ");

/** For every answer of the pages, beside what `net/guards.ts` adds to every answer. */
export const secured: MiddlewareHandler = async (c, next) => {
  await next();
  c.header("Content-Security-Policy", POLICY);
  c.header("Cache-Control", "no-store");
};

export function page(
  c: Context,
  status: ContentfulStatusCode,
  title: string,
  body: Html,
): Response | Promise<Response> {
  return c.html(
    html`<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<title>${title}</title>
<style>${raw(STYLE)}</style>
</head>
<body>
<main>
<h1>${title}</h1>
${body}
</main>
</body>
</html>
`,
    status,
  );
}

/** A page of one sentence. */
export function notice(
  c: Context,
  status: ContentfulStatusCode,
  title: string,
  text: string,
): Response | Promise<Response> {
  return page(c, status, title, html`<p>${text}</p>`);
}
