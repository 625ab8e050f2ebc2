import { afterEach, beforeEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { once } from "node:events";
import { existsSync, mkdtempSync, rmSync, statSync } from "node:fs";
import { createServer as createHttpServer } from "node:http";
import { connect, createServer, type Server } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { until } from "./testing.ts";
import { type Credentials, lockFile, peerCredentials, socketFd } from "./unix.ts";

// Programs start, and the kernel changes its network, as slowly as the machine is busy.
setDefaultTimeout(120_000);

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "weft-unix-"));
});
afterEach(() => rmSync(folder, { recursive: true }));

const own = () => ({ uid: process.getuid!(), gid: process.getgid!() });

async function listen(server: Server): Promise<string> {
  const path = join(folder, "s.sock");
  server.listen(path);
  await once(server, "listening");
  return path;
}

describe("credentials of a unix socket's peer", () => {
  test("are those of the process that connected", async () => {
    const seen: Credentials[] = [];
    const server = createServer((socket) => {
      seen.push(peerCredentials(socket), peerCredentials(socketFd(socket)));
      socket.end();
    });
    const path = await listen(server);
    try {
      const script = `require("node:net").connect(${JSON.stringify(path)}).resume();`;
      const child = Bun.spawn([process.execPath, "-e", script]);
      await child.exited;
      expect(seen).toEqual([
        { pid: child.pid, ...own() },
        { pid: child.pid, ...own() },
      ]);
    } finally {
      server.close();
    }
  });

  test("are known to a node:http server that is handed its connections", async () => {
    const http = createHttpServer((request, response) => {
      response.end(JSON.stringify({ url: request.url, ...peerCredentials(request.socket) }));
    });
    const server = createServer((socket) => http.emit("connection", socket));
    const path = await listen(server);
    try {
      for (const url of ["/a", "/b"]) {
        const response = await fetch(`http://local${url}`, { unix: path });
        expect(await response.json()).toEqual({ url, pid: process.pid, ...own() });
      }
    } finally {
      server.close();
    }
  });

  test("of a closed socket, or one that is none, are an error and not somebody else's", async () => {
    const server = createServer((socket) => socket.end());
    const path = await listen(server);
    const client = connect(path);
    client.resume();
    await once(client, "close");
    expect(() => peerCredentials(client)).toThrow("find a socket's descriptor: it is closed (EBADF)");
    expect(() => peerCredentials(0x7fff_0000)).toThrow(
      /credentials of a unix socket's peer: bad file descriptor \(EBADF\)/,
    );
    server.close();
  });
});

describe("a lock file", () => {
  test("keeps a second holder out until the first lets go", () => {
    const path = join(folder, "lock");
    const first = lockFile(path)!;
    expect(statSync(path).mode & 0o777).toBe(0o600);
    expect(lockFile(path)).toBeNull();
    first.release();
    first.release();
    using second = lockFile(path)!;
    expect(second).not.toBeNull();
    expect(existsSync(path)).toBe(true);
  });

  test("is free again when its process was killed", async () => {
    const path = join(folder, "lock");
    const script = `
      import { lockFile } from ${JSON.stringify(`${import.meta.dir}/unix.ts`)};
      console.log(lockFile(${JSON.stringify(path)}) !== null);
      setInterval(() => {}, 1000);`;
    const child = Bun.spawn([process.execPath, "-e", script], { stdout: "pipe" });
    const { value } = await child.stdout.getReader().read();
    expect(new TextDecoder().decode(value)).toBe("true\n");
    expect(lockFile(path)).toBeNull();
    child.kill("SIGKILL");
    await child.exited;
    using lock = lockFile(path);
    expect(lock).not.toBeNull();
  });

  test("is not inherited by a child that outlives the daemon", async () => {
    const path = join(folder, "lock");
    const first = lockFile(path)!;
    const child = Bun.spawn(["sleep", "60"]);
    try {
      first.release();
      // The child drops it in its exec, a moment after spawn returns here.
      using second = await until("the lock", () => lockFile(path));
      second.release();
      expect(child.exitCode).toBeNull();
    } finally {
      child.kill("SIGKILL");
      await child.exited;
    }
  });

  test("in a folder that is not there is a sentence", () => {
    const path = join(folder, "absent", "lock");
    expect(() => lockFile(path)).toThrow(`open the lock file ${path}: no such file or object (ENOENT)`);
  });
});
