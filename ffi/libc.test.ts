import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { EBADF, ENOENT, errnoName, SysError } from "./errno.ts";
import { addressOf, buffer, check, cstring, errno, libc, orErrno } from "./libc.ts";

// Programs start, and the kernel changes its network, as slowly as the machine is busy.
setDefaultTimeout(120_000);

function thrown(action: () => unknown): SysError {
  try {
    action();
  } catch (error) {
    if (error instanceof SysError) return error;
    throw error;
  }
  throw new Error("nothing was thrown");
}

describe("libc", () => {
  test("a failing call leaves errno, and check makes a sentence of it", () => {
    expect(libc.open(cstring("/nonexistent/file"), 0, 0)).toBe(-1);
    expect(errno()).toBe(ENOENT);
    const error = thrown(() => check(libc.open(cstring("/nonexistent/file"), 0, 0), "open /nonexistent/file"));
    expect(error).toMatchObject({ errno: ENOENT, code: "ENOENT", name: "SysError" });
    expect(error.message).toBe("open /nonexistent/file: no such file or object (ENOENT)");
    expect(orErrno(libc.close(-1))).toBe(-EBADF);
    expect(check(7, "seven")).toBe(7);
  });

  test("a given reason stands in the sentence, and numbers without a text or a name print too", () => {
    expect(new SysError(ENOENT, "open x", "run y").message).toBe("open x: run y (ENOENT)");
    expect(new SysError(95, "a").code).toBe("EOPNOTSUPP");
    expect(new SysError(133, "a").message).toBe("a: EHWPOISON");
    expect(errnoName(4095)).toBe("E4095");
  });

  test("a pointer is the address of the bytes: the kernel reads WebAssembly memory in place", () => {
    const memory = new WebAssembly.Memory({ initial: 2, maximum: 2, shared: true });
    const bytes = new Uint8Array(memory.buffer);
    const base = addressOf(memory.buffer);
    const path = "/proc/self/comm\0";
    new TextEncoder().encodeInto(path, bytes.subarray(100, 100 + path.length));
    const fd = check(libc.open(base + 100, 0, 0), "open");
    expect(libc.read(fd, base + 70_000, 64)).toBeGreaterThan(1);
    libc.close(fd);
    expect(bytes[70_000]).toBeGreaterThan(32);
  });

  test("a buffer does not move", () => {
    const bytes = buffer(8);
    const before = addressOf(bytes);
    for (let i = 0; i < 5; i++) {
      void bytes.buffer.byteLength;
      Bun.gc(true);
    }
    expect(addressOf(bytes)).toBe(before);
  });

  test("a path with a NUL is refused before the kernel sees half of it", () => {
    expect(() => cstring("a\0b")).toThrow('"a\\u0000b" holds a NUL character');
  });

  test("errno is each thread's own", async () => {
    const source = `
      import { errno, libc } from ${JSON.stringify(`${import.meta.dir}/libc.ts`)};
      self.onmessage = ({ data: rounds }) => {
        let wrong = 0;
        for (let i = 0; i < rounds; i++) if (libc.close(-1) !== -1 || errno() !== ${EBADF}) wrong++;
        postMessage(wrong);
      };
      postMessage("ready");`;
    const worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
    const answers: unknown[] = [];
    const answer = () =>
      new Promise((resolve, reject) => {
        worker.onmessage = ({ data }) => resolve(data);
        worker.onerror = ({ message }) => reject(new Error(message));
      });
    try {
      answers.push(await answer());
      const wrongThere = answer();
      worker.postMessage(20_000);
      let wrongHere = 0;
      const path = cstring("/nonexistent");
      for (let i = 0; i < 20_000; i++) if (libc.open(path, 0, 0) !== -1 || errno() !== ENOENT) wrongHere++;
      expect(wrongHere).toBe(0);
      answers.push(await wrongThere);
    } finally {
      worker.terminate();
    }
    expect(answers).toEqual(["ready", 0]);
  });
});
