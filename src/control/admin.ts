// The administrator's API on a unix socket in the data folder: paths and shapes of Headscale's /api/v1
// (spec/headscale-features.md, section 5). Whoever may open the socket (mode 0600) may do everything.
import { chmodSync, rmSync } from "node:fs";
import { createServer, type Server } from "node:http";
import { createAdaptorServer } from "@hono/node-server";
import { type Context, Hono } from "hono";
import { bodyLimit } from "hono/body-limit";
import { z } from "zod";
import type { Commands } from "./commands.ts";
import { CommandError } from "./errors.ts";

export interface Admin {
  close(): Promise<void>;
}

/** Resolves when the socket answers. The caller holds the data folder's lock: a socket that is there is a leftover. */
export async function startAdmin(path: string, commands: Commands): Promise<Admin> {
  const server = createAdaptorServer({ fetch: adminApp(commands).fetch, createServer }) as Server;
  server.on("clientError", (_error, socket) => socket.destroy());
  server.prependListener("request", (request, response) => {
    request.on("error", () => {});
    response.on("error", () => {});
  });
  rmSync(path, { force: true });
  await new Promise<void>((resolve, reject) => {
    server.once("error", (error) => reject(new Error(`the admin socket ${path} cannot be made: ${error.message}`)));
    server.listen(path, resolve);
  });
  chmodSync(path, 0o600);
  return {
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve());
        server.closeAllConnections();
        rmSync(path, { force: true });
      }),
  };
}

const id = z.union([z.string().regex(/^\d{1,15}$/), z.number().int().nonnegative()]).transform(Number);
const time = z.iso.datetime({ offset: true }).transform((text) => Date.parse(text));

const createUser = z.object({
  name: z.string(),
  displayName: z.string().optional(),
  email: z.string().optional(),
  pictureUrl: z.string().optional(),
});
const createKey = z.object({
  user: id.optional(),
  reusable: z.boolean().optional(),
  ephemeral: z.boolean().optional(),
  expiration: time.optional(),
  aclTags: z.array(z.string()).max(100).optional(),
});
const byId = z.object({ id });
const expireNode = z.object({ expiry: time.optional(), disableExpiry: z.boolean().optional() });

function adminApp(commands: Commands): Hono {
  const app = new Hono();
  app.use(
    bodyLimit({
      maxSize: 64 * 1024,
      onError: () => {
        throw new CommandError(400, "the request body is too large");
      },
    }),
  );
  app.onError((error, c) => {
    const status = error instanceof CommandError ? error.status : 500;
    return c.json({ title: "the command failed", status, detail: error.message }, status, {
      "Content-Type": "application/problem+json",
    });
  });
  app.notFound((c) =>
    c.json({ title: "not found", status: 404, detail: `there is no ${c.req.method} ${c.req.path}` }, 404, {
      "Content-Type": "application/problem+json",
    }),
  );

  const api = app.basePath("/api/v1");
  api.get("/health", (c) => c.json({ databaseConnectivity: true }));

  api.get("/user", (c) => {
    const filter = c.req.query("id");
    return c.json({
      users: commands.listUsers({
        id: filter === undefined ? undefined : parseId(filter),
        name: c.req.query("name"),
        email: c.req.query("email"),
      }),
    });
  });
  api.post("/user", async (c) => c.json({ user: await commands.createUser(await body(c, createUser)) }));
  api.delete("/user/:id", async (c) => {
    await commands.destroyUser(parseId(c.req.param("id")));
    return c.json({});
  });

  api.get("/preauthkey", (c) => c.json({ preAuthKeys: commands.listKeys() }));
  api.post("/preauthkey", async (c) => c.json({ preAuthKey: await commands.createKey(await body(c, createKey)) }));
  api.post("/preauthkey/expire", async (c) => {
    await commands.expireKey((await body(c, byId)).id);
    return c.json({});
  });

  api.get("/node", (c) => c.json({ nodes: commands.listNodes({ user: c.req.query("user") }) }));
  api.get("/node/:id", (c) => c.json({ node: commands.getNode(parseId(c.req.param("id"))) }));
  api.delete("/node/:id", async (c) => {
    await commands.deleteNode(parseId(c.req.param("id")));
    return c.json({});
  });
  api.post("/node/:id/expire", async (c) => {
    const { expiry, disableExpiry } = await body(c, expireNode);
    const at = disableExpiry ? null : (expiry ?? Date.now());
    return c.json({ node: await commands.expireNode(parseId(c.req.param("id")), at) });
  });
  api.post("/node/:id/rename/:name", async (c) =>
    c.json({ node: await commands.renameNode(parseId(c.req.param("id")), c.req.param("name")) }),
  );
  return app;
}

function parseId(text: string): number {
  const parsed = id.safeParse(text);
  if (!parsed.success) throw new CommandError(400, `"${text.slice(0, 40)}" is not an id: ids are whole numbers`);
  return parsed.data;
}

async function body<T>(c: Context, schema: z.ZodType<T>): Promise<T> {
  let value: unknown = {};
  const text = await c.req.text();
  if (text !== "") {
    try {
      value = JSON.parse(text);
    } catch {
      throw new CommandError(400, "the request body is not JSON");
    }
  }
  const parsed = schema.safeParse(value);
  if (parsed.success) return parsed.data;
  const issue = parsed.error.issues[0]!;
  throw new CommandError(400, `${issue.path.join(".") || "the request body"}: ${issue.message}`);
}
