// The debug page: what an operator looks at when something is odd. On the listener of the metrics, for clients of private
// addresses only; as JSON for programs (`Accept: application/json`). Nothing here is a secret, and nothing changes anything.
// Long lists are given in parts.
import { type Context, Hono } from "hono";
import { html } from "hono/html";
import { clientAddress } from "../net/client-address.ts";
import { isPrivate } from "../wire/private.ts";
import { page, secured } from "./pages/layout.ts";

/** `ofNode`: of the node that `?node=ID` names, undefined for none. A list is shown from `?from=N` on. */
export type DebugPage = { title: string } & ({ read: () => unknown } | { ofNode: (id: number) => unknown });
/** By the last part of the path. */
export type DebugPages = Record<string, DebugPage>;

/** Entries of a list, and characters of what is shown. */
const MAX_ENTRIES = 500;
const MAX_TEXT = 4 * 1024 * 1024;

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
  for (const [path, entry] of Object.entries(pages))
    app.get(`/debug/${path}`, (c) => {
      if ("read" in entry) return answer(c, entry.title, entry.read());
      const node = c.req.query("node") ?? "";
      if (node === "" && !wantsJson(c)) return page(c, 200, entry.title, askForNode(path));
      const value = /^\d{1,15}$/.test(node) ? entry.ofNode(Number(node)) : undefined;
      if (value === undefined)
        return c.text(`there is no node ${JSON.stringify(node.slice(0, 20))}: say ?node=ID`, 404);
      return answer(c, `${entry.title}: ${node}`, value);
    });
  return app;
}

function askForNode(path: string) {
  return html`<form action="/debug/${path}"><label>Node <input name="node" inputmode="numeric"></label> <button>Show</button></form>`;
}

function answer(c: Context, title: string, value: unknown): Response | Promise<Response> {
  if (!Array.isArray(value)) return wantsJson(c) ? c.json(value as object) : page(c, 200, title, shown(value));
  const asked = c.req.query("from") ?? "0";
  const from = /^\d{1,9}$/.test(asked) ? Number(asked) : 0;
  const part = value.slice(from, from + MAX_ENTRIES);
  c.header("X-Total-Count", String(value.length));
  if (wantsJson(c)) return c.json(part);
  const next = from + part.length;
  const query = new URLSearchParams({ ...c.req.query(), from: String(next) });
  const more = next < value.length ? html`<p><a href="?${query}">The other ${value.length - next}</a></p>` : "";
  return page(c, 200, title, html`${shown(part)}${more}`);
}

function wantsJson(c: Context): boolean {
  return (c.req.header("Accept") ?? "").includes("application/json");
}

function shown(value: unknown) {
  const text = typeof value === "string" ? value : JSON.stringify(value, null, 2);
  return html`<pre>${text.length > MAX_TEXT ? `${text.slice(0, MAX_TEXT)}\n…` : text}</pre>`;
}
