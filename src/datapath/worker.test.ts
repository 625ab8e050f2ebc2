import { expect, test } from "bun:test";
import { MessageChannel, Worker } from "node:worker_threads";
import { epollCreate } from "../../ffi/epoll.ts";
import { eventfdCreate, eventfdWake } from "../../ffi/eventfd.ts";
import { closeFd } from "../../ffi/libc.ts";
import { ASM_DROPS } from "./asm.ts";
import { Mailbox } from "./mailbox.ts";
import {
  type Command,
  LINK_CLOSE,
  LINK_FENCE,
  LINK_FENCED,
  LINK_MTU,
  LINK_SESSION,
  type Link,
  type Reply,
  SENDER_STATS,
  type SenderSetup,
  type WorkerSetup,
} from "./messages.ts";
import { Ring } from "./ring.ts";

function start(setup: Partial<WorkerSetup> | ((shared: WorkerSetup) => SenderSetup)) {
  const { port1, port2 } = new MessageChannel();
  const wakeFd = eventfdCreate();
  let epollFd = epollCreate();
  const tunLike = eventfdCreate();
  const shared: WorkerSetup = {
    role: "device",
    helpers: 0,
    link: null,
    mode: "wg",
    mtu: 1420,
    tun: { fd: tunLike, vnetHeader: true, tso: true, uso: true },
    sockets: { fd4: -1, fd6: -1, gso4: false, gso6: false, gro: false },
    epollFd,
    wakeFd,
    toMain: new Ring(1 << 14).buffer,
    toWorker: new Ring(1 << 14).buffer,
    port: port2,
  };
  const workerData = typeof setup === "function" ? setup(shared) : { ...shared, ...setup };
  const replies: Reply[] = [];
  let arrived: () => void = () => {};
  port1.on("message", (reply: Reply) => {
    replies.push(reply);
    arrived();
  });
  const worker = new Worker(new URL("./worker.ts", import.meta.url), { workerData, transferList: [port2] });
  return {
    replies,
    wake: () => eventfdWake(wakeFd),
    /** A descriptor goes under it. */
    damage: () => {
      closeFd(epollFd);
      epollFd = -1;
    },
    send: (command: Command) => {
      port1.postMessage(command);
      eventfdWake(wakeFd);
    },
    async until(type: Reply["type"]): Promise<Reply> {
      for (;;) {
        const found = replies.find((reply) => reply.type === type);
        if (found) return found;
        await new Promise<void>((resolve) => {
          arrived = resolve;
        });
      }
    },
    async [Symbol.asyncDispose]() {
      port1.close();
      await worker.terminate();
      closeFd(wakeFd);
      if (epollFd >= 0) closeFd(epollFd);
      closeFd(tunLike);
    },
  };
}

test("what goes wrong in the Worker reaches the main thread as one sentence", async () => {
  await using worker = start({ tun: { fd: -1, vnetHeader: true, tso: true, uso: true } });
  const fatal = await worker.until("fatal");
  expect(fatal).toEqual({ type: "fatal", reason: expect.stringMatching(/^the datapath failed: [^\n]+$/) });
}, 120_000);

const sender = ({ mtu, tun, sockets, epollFd, toMain, port, wakeFd }: WorkerSetup): SenderSetup => {
  const link: Link = {
    toSender: new Ring(1 << 14).buffer,
    toReceiver: new Ring(1 << 14).buffer,
    senderWakeFd: wakeFd,
    receiverWakeFd: wakeFd,
    stats: new SharedArrayBuffer(8 * (SENDER_STATS.length + ASM_DROPS.length)),
  };
  return { role: "sender", helpers: 0, mtu, tun, sockets, link, epollFd, toMain, port };
};

test("so does what goes wrong in the sender", async () => {
  for (const fd of [-1, 1 << 20]) {
    await using worker = start((shared) => {
      const setup = sender(shared);
      return { ...setup, tun: { ...setup.tun, fd } };
    });
    const fatal = await worker.until("fatal");
    expect(fatal).toEqual({ type: "fatal", reason: expect.stringMatching(/^the datapath failed: [^\n]+$/) });
  }
}, 120_000);

test("the sender answers a fence when what came before has taken effect, and ends when told", async () => {
  let link!: Link;
  await using worker = start((shared) => {
    const setup = sender(shared);
    link = setup.link;
    return setup;
  });
  await worker.until("ready");
  const box = new Mailbox(new Ring(link.toSender));
  const from = new Ring(link.toReceiver);
  const words = new Uint32Array(16);
  for (let number = 1; number <= 3; number++) {
    box.post(LINK_MTU, new Uint8Array(4));
    box.post(LINK_FENCE, Uint8Array.of(number, 0, 0, 0));
    worker.wake();
    const deadline = performance.now() + 60_000;
    while (from.empty && performance.now() < deadline) await Bun.sleep(1);
    expect(from.read(words)).toBe((LINK_FENCED << 16) | 4);
    expect(words[0]).toBe(number);
  }
  box.post(LINK_CLOSE, new Uint8Array(0));
  worker.wake();
  await worker.until("closed");
}, 120_000);

test("the key of a sender that breaks is wiped", async () => {
  const key = new Uint8Array(32).fill(0x5a);
  let link!: Link;
  await using worker = start((shared) => {
    // Helpers, for the sake of its memory, which they would share.
    const setup = { ...sender(shared), helpers: 1 };
    ({ link } = setup);
    return setup;
  });
  const ready = await worker.until("ready");
  const { memory } = (ready as Extract<Reply, { type: "ready" }>).crew!;
  // As it stands in the state of a cipher: each word in four lanes.
  const keys = () => Buffer.from(new Uint8Array(memory.buffer, 0, 96 << 20)).indexOf(Buffer.alloc(128, 0x5a));
  const box = new Mailbox(new Ring(link.toSender, true));
  const record = new Uint8Array(48);
  record.set([1, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
  record.set(key, 16);
  box.post(LINK_SESSION, record);
  worker.wake();
  const deadline = performance.now() + 60_000;
  while (keys() < 0 && performance.now() < deadline) await Bun.sleep(5);
  expect(keys()).toBeGreaterThan(0);
  worker.damage();
  worker.wake();
  expect(await worker.until("fatal")).toEqual({
    type: "fatal",
    reason: "the datapath failed: epoll_wait failed with errno 9",
  });
  expect(keys()).toBe(-1);
  expect(Buffer.from(link.toSender).indexOf(Buffer.from(key))).toBe(-1);
}, 120_000);

test("commands are answered by id while the Worker sleeps in epoll; close ends it", async () => {
  await using worker = start({});
  await worker.until("ready");
  worker.send({ id: 1, type: "configure", update: { privateKey: new Uint8Array(32).fill(5) }, sockets: null });
  worker.send({ id: 2, type: "configure", update: { privateKey: new Uint8Array(3) }, sockets: null });
  worker.send({ id: 3, type: "filter", filter: { rules: [], local: ["10.0.0.0/8"] } });
  worker.send({ id: 4, type: "dump" });
  worker.send({ type: "close" });
  await worker.until("closed");
  expect(worker.replies).toEqual([
    { type: "ready", crew: null },
    { type: "done", id: 1 },
    { type: "failed", id: 2, reason: expect.stringMatching(/^[^\n]+$/) },
    { type: "done", id: 3 },
    { type: "done", id: 4, value: expect.objectContaining({ privateKey: new Uint8Array(32).fill(5), peers: [] }) },
    { type: "closed" },
  ]);
}, 120_000);
