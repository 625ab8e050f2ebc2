// The APIs on a unix socket in the data folder. Whoever may open the socket may do everything: its owner, unless the configuration says more.
import { chmodSync, mkdirSync, rmSync } from "node:fs";
import { createServer, type Server } from "node:http";
import { dirname } from "node:path";
import { createAdaptorServer } from "@hono/node-server";
import type { Hono } from "hono";
import { drain } from "../net/listener.ts";

export interface Admin {
  close(): Promise<void>;
}

/** Resolves when the socket answers. The caller holds the data folder's lock: a socket that is there is a leftover. */
export async function startAdmin({ path, mode }: { path: string; mode: number }, app: Hono): Promise<Admin> {
  mkdirSync(dirname(path), { recursive: true, mode: 0o750 });
  const server = createAdaptorServer({ fetch: app.fetch, createServer, autoCleanupIncoming: false }) as Server;
  server.on("clientError", (_error, socket) => socket.destroy());
  server.prependListener("request", (request, response) => {
    request.on("error", () => {});
    response.on("error", () => {});
    response.once("finish", () => drain(request));
  });
  rmSync(path, { force: true });
  await new Promise<void>((resolve, reject) => {
    server.once("error", (error) => reject(new Error(`the admin socket ${path} cannot be made: ${error.message}`)));
    server.listen(path, resolve);
  });
  chmodSync(path, mode);
  return {
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve());
        server.closeAllConnections();
        rmSync(path, { force: true });
      }),
  };
}
