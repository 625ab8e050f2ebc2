// The APIs on a unix socket in the data folder. Whoever may open the socket (mode 0600) may do everything.
import { chmodSync, rmSync } from "node:fs";
import { createServer, type Server } from "node:http";
import { createAdaptorServer } from "@hono/node-server";
import type { Hono } from "hono";

export interface Admin {
  close(): Promise<void>;
}

/** Resolves when the socket answers. The caller holds the data folder's lock: a socket that is there is a leftover. */
export async function startAdmin(path: string, app: Hono): Promise<Admin> {
  const server = createAdaptorServer({ fetch: app.fetch, createServer }) as Server;
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
