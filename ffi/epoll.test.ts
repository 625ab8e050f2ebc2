import { describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  EPOLL_EVENT_DATA,
  EPOLL_EVENT_SIZE,
  EPOLLIN,
  EPOLLOUT,
  epollAdd,
  epollCreate,
  epollDelete,
  epollWait,
} from "./epoll.ts";
import { eventfdCreate, eventfdDrain, eventfdWake } from "./eventfd.ts";
import { buffer, closeFd } from "./libc.ts";

// Programs start, and the kernel changes its network, as slowly as the machine is busy.
setDefaultTimeout(120_000);

function setUp() {
  const epoll = epollCreate();
  const fds = [eventfdCreate(), eventfdCreate()];
  const events = buffer(8 * EPOLL_EVENT_SIZE);
  const view = new DataView(events.buffer);
  return {
    epoll,
    a: fds[0]!,
    b: fds[1]!,
    /** [token, events] of each ready descriptor. */
    wait(timeoutMs: number): [number, number][] {
      const count = epollWait(epoll, events, 8, timeoutMs);
      return Array.from({ length: count }, (_, i) => {
        const at = i * EPOLL_EVENT_SIZE;
        return [view.getUint32(at + EPOLL_EVENT_DATA, true), view.getUint32(at, true)] as [number, number];
      }).sort(([x], [y]) => x - y);
    },
    [Symbol.dispose]() {
      for (const fd of [epoll, ...fds]) closeFd(fd);
    },
  };
}

describe("epoll and eventfd", () => {
  test("reports the token of what is ready, again and again until it is drained", () => {
    using set = setUp();
    epollAdd(set.epoll, set.a, EPOLLIN, 0xdeadbeef);
    epollAdd(set.epoll, set.b, EPOLLIN, 7);
    expect(set.wait(0)).toEqual([]);
    eventfdWake(set.a);
    expect(set.wait(0)).toEqual([[0xdeadbeef, EPOLLIN]]);
    eventfdWake(set.b);
    eventfdWake(set.b);
    expect(set.wait(0)).toEqual([
      [7, EPOLLIN],
      [0xdeadbeef, EPOLLIN],
    ]);
    expect(eventfdDrain(set.b)).toBe(true);
    expect(eventfdDrain(set.b)).toBe(false);
    expect(set.wait(0)).toEqual([[0xdeadbeef, EPOLLIN]]);
  });

  test("a watch can be taken away", () => {
    using set = setUp();
    epollAdd(set.epoll, set.a, EPOLLOUT, 2);
    expect(set.wait(0)).toEqual([[2, EPOLLOUT]]);
    epollDelete(set.epoll, set.a);
    expect(set.wait(0)).toEqual([]);
    expect(() => epollDelete(set.epoll, set.a)).toThrow(
      /^stop watching descriptor \d+: no such file or object \(ENOENT\)$/,
    );
  });

  test("a thread that sleeps in epoll_wait for ever is woken by another thread's eventfd", async () => {
    using set = setUp();
    epollAdd(set.epoll, set.a, EPOLLIN, 42);
    const source = `
      import { epollWait } from ${JSON.stringify(`${import.meta.dir}/epoll.ts`)};
      import { buffer } from ${JSON.stringify(`${import.meta.dir}/libc.ts`)};
      postMessage("asleep");
      postMessage(epollWait(${set.epoll}, buffer(64), 4, -1));`;
    const worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
    try {
      const messages: unknown[] = [];
      await new Promise<void>((resolve, reject) => {
        worker.onerror = ({ message }) => reject(new Error(message));
        worker.onmessage = ({ data }) => {
          messages.push(data);
          if (data === "asleep") eventfdWake(set.a);
          else resolve();
        };
      });
      expect(messages).toEqual(["asleep", 1]);
    } finally {
      worker.terminate();
    }
  });
});
