import { afterEach, describe, expect, test } from "bun:test";
import { existsSync, mkdtempSync, rmSync, statSync, writeFileSync } from "node:fs";
import { request as httpRequest } from "node:http";
import { createConnection } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { ApiError, type ApiHandler, type ApiRequest, isSocketAlive, LOCAL_API_HOST, LocalApi } from "./local-api.ts";

const closers: (() => void)[] = [];
afterEach(() => {
  for (const close of closers.splice(0).reverse()) close();
});

function place(): string {
  const folder = mkdtempSync(join(tmpdir(), "weft-api-"));
  closers.push(() => rmSync(folder, { recursive: true }));
  return join(folder, "run", "weft.sock");
}

async function listen(handler: ApiHandler): Promise<string> {
  const path = place();
  const api = await LocalApi.listen(path, handler);
  closers.push(() => api.close());
  return path;
}

function call(
  socketPath: string,
  method: string,
  path: string,
  headers: Record<string, string> = { Host: LOCAL_API_HOST },
  body?: string,
): Promise<{ status: number; text: string }> {
  return new Promise((resolve, reject) => {
    const outgoing = httpRequest({ socketPath, method, path, headers }, (answer) => {
      const parts: Uint8Array[] = [];
      answer.on("data", (chunk: Uint8Array) => parts.push(chunk));
      answer.on("end", () => resolve({ status: answer.statusCode!, text: Buffer.concat(parts).toString() }));
    });
    outgoing.on("error", reject);
    outgoing.end(body);
  });
}

test("a request reaches the handler with path, query, body and the caller's rights", async () => {
  let seen: ApiRequest | null = null;
  const socket = await listen(async (request) => {
    seen = request;
    return { ok: 1 };
  });
  const { status, text } = await call(socket, "PATCH", "/localapi/v0/prefs?x=1", { Host: LOCAL_API_HOST }, '{"a":2}');
  expect(status).toBe(200);
  expect(text).toBe('{\n\t"ok": 1\n}\n');
  expect(seen!).toMatchObject({ method: "PATCH", path: "prefs", body: { a: 2 }, canWrite: true });
  expect(seen!.query.get("x")).toBe("1");
  // Everyone may read; writing is decided by the credentials.
  expect(statSync(socket).mode & 0o777).toBe(0o666);
});

test("nothing to say is 204, an ApiError its status and sentence, any other error 500", async () => {
  const socket = await listen(async ({ path }) => {
    if (path === "a") return undefined;
    if (path === "b") throw new ApiError(404, "no such thing");
    throw new Error("broken");
  });
  expect(await call(socket, "POST", "/localapi/v0/a")).toEqual({ status: 204, text: "" });
  expect(await call(socket, "GET", "/localapi/v0/b")).toEqual({ status: 404, text: '{"error":"no such thing"}' });
  expect(await call(socket, "GET", "/localapi/v0/c")).toEqual({ status: 500, text: '{"error":"broken"}' });
});

describe("what is refused before the handler", () => {
  test("requests that a web page made, bodies that are too long or no JSON, other paths", async () => {
    let calls = 0;
    const socket = await listen(async () => {
      calls++;
      return {};
    });
    const at = "/localapi/v0/status";
    const Host = LOCAL_API_HOST;
    expect((await call(socket, "GET", at, { Host: "evil.example" })).status).toBe(403);
    expect((await call(socket, "GET", at, { Host, Origin: "http://evil.example" })).status).toBe(403);
    expect((await call(socket, "GET", at, { Host, Referer: "http://evil.example/" })).status).toBe(403);
    expect((await call(socket, "GET", "/status")).status).toBe(404);
    expect((await call(socket, "POST", at, { Host }, "{")).status).toBe(400);
    expect((await call(socket, "POST", at, { Host }, "x".repeat(1024 * 1024 + 1))).status).toBe(413);
    expect(calls).toBe(0);
  });

  test("garbage ends the connection, not the daemon", async () => {
    const socket = await listen(async () => ({}));
    await new Promise<void>((resolve) => {
      const connection = createConnection({ path: socket });
      connection.on("error", () => {});
      connection.on("close", () => resolve());
      connection.on("data", () => {});
      connection.end(new Uint8Array(2000).fill(0xff));
    });
    expect((await call(socket, "GET", "/localapi/v0/x")).status).toBe(200);
  });
});

describe("the socket", () => {
  test("of a living daemon is not taken; one that a dead daemon left is", async () => {
    const socket = await listen(async () => ({}));
    expect(await isSocketAlive(socket)).toBe(true);
    await expect(LocalApi.listen(socket, async () => ({}))).rejects.toThrow(`a daemon is running already on ${socket}`);
    const left = `${socket}.left`;
    writeFileSync(left, "");
    const api = await LocalApi.listen(left, async () => 1);
    expect((await call(left, "GET", "/localapi/v0/x")).text).toBe("1\n");
    api.close();
    expect(existsSync(left)).toBe(false);
  });

  test("in a folder that cannot be made is one sentence", async () => {
    const socket = await listen(async () => ({}));
    await expect(LocalApi.listen(join(socket, "x.sock"), async () => ({}))).rejects.toThrow("cannot");
  });
});
