// The debug page: what an operator looks at when something is odd. On the listener of the metrics, for clients of private
// addresses only; as JSON for programs (`Accept: application/json`). Nothing here is a secret, and nothing changes anything.
import { type Context, Hono } from "hono";
import { html } from "hono/html";
import { clientAddress } from "../net/client-address.ts";
import { isPrivate } from "../wire/private.ts";
import { page, secured } from "./pages/layout.ts";

/** By the last part of the path: what is shown, and how it is called. */
export type DebugPages = Record<string, { title: string; read: () => unknown }>;

export function createDebug(pages: DebugPages): Hono {
  const app = new Hono();
  app.use("/debug/*", secured, async (c, next) => {
    const address = clientAddress(c);
    // Over a unix socket there is no address.
    if (address !== "" && !isPrivate(address)) return c.text("the debug page is for private addresses only", 403);
    return next();
  });
  app.get("/debug", (c) => c.redirect("/debug/"));
  app.get("/debug/", (c) => {
    const links = Object.entries(pages).map(([path, { title }]) => ({ path: `/debug/${path}`, title }));
    if (wantsJson(c)) return c.json(links);
    return page(
      c,
      200,
      "Weft",
      html`<ul>${links.map(({ path, title }) => html`<li><a href="${path}">${title}</a></li>`)}</ul>`,
    );
  });
  for (const [path, { title, read }] of Object.entries(pages))
    app.get(`/debug/${path}`, (c) => {
      const value = read();
      return wantsJson(c) ? c.json(value) : page(c, 200, title, html`<pre>${show(value)}</pre>`);
    });
  return app;
}

function wantsJson(c: Context): boolean {
  return (c.req.header("Accept") ?? "").includes("application/json");
}

function show(value: unknown): string {
  return typeof value === "string" ? value : JSON.stringify(value, null, 2);
}
