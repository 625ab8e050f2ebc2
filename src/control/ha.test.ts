import { expect, test } from "bun:test";
import fc from "fast-check";
import { Prober } from "./ha.ts";
import { makeSettings, type TestNode, TestServer, until } from "./testing.ts";

const OPTIONS = { interval: 1000, timeout: 400 };

test("each router is asked once a round, and one that does not answer in time is sick until it does", () => {
  const prober = new Prober(OPTIONS);
  const first = prober.step(0, [1, 2]);
  expect(first.ask.map(({ nodeId }) => nodeId)).toEqual([1, 2]);
  expect(prober.wakeAt).toBe(400);
  expect(prober.answered(1, first.ask[0]!.question, 100)).toBe(true);
  expect(prober.answered(1, first.ask[0]!.question, 101)).toBe(false);
  expect(prober.step(399, [1, 2])).toEqual({ ask: [], sick: [] });
  expect(prober.step(400, [1, 2])).toEqual({ ask: [], sick: [2] });
  expect(prober.answered(2, first.ask[1]!.question, 500)).toBe(false);
  expect(prober.wakeAt).toBe(1000);
  expect(prober.step(1000, [1, 2]).ask.map(({ nodeId }) => nodeId)).toEqual([1, 2]);
});

test("a router whose map stream ends has the time of an answer to come back", () => {
  const prober = new Prober(OPTIONS);
  prober.step(0, []);
  prober.disconnected(1, 100);
  expect(prober.wakeAt).toBe(500);
  expect(prober.step(499, [1, 2]).sick).toEqual([]);
  prober.connected(1);
  expect(prober.step(600, [1, 2]).sick).toEqual([]);
  prober.disconnected(1, 700);
  prober.disconnected(1, 1000);
  expect(prober.step(1099, [1, 2]).sick).toEqual([]);
  expect(prober.step(1100, [1, 2]).sick).toEqual([1]);
  // Who shares no subnet any more is nobody's concern.
  prober.disconnected(2, 1200);
  expect(prober.step(1900, [1]).sick).toEqual([]);
});

test("whatever happens when, only silence makes sick, and silence does within one round and one timeout", () => {
  const event = fc.record({
    wait: fc.integer({ min: 0, max: 700 }),
    what: fc.constantFrom("step", "step", "answer", "late", "connect", "disconnect", "leave", "join"),
    id: fc.integer({ min: 1, max: 3 }),
  });
  let found = 0;
  fc.assert(
    fc.property(fc.array(event, { maxLength: 80, size: "max" }), (events) => {
      const prober = new Prober(OPTIONS);
      const routers = new Set([1, 2, 3]);
      /** Since when each router has been silent: its first question or its end, unanswered. */
      const silent = new Map<number, number>();
      const asked = new Map<number, number>();
      let now = 0;
      const step = (): void => {
        const { ask, sick } = prober.step(now, [...routers]);
        for (const id of sick) {
          found++;
          expect(routers.has(id)).toBe(true);
          expect(now - silent.get(id)!).toBeGreaterThanOrEqual(OPTIONS.timeout);
          silent.delete(id);
        }
        for (const { nodeId, question } of ask) {
          asked.set(nodeId, question);
          silent.set(nodeId, now);
        }
        // Nobody is silent for longer than it may be.
        for (const [id, since] of silent) if (routers.has(id)) expect(now - since).toBeLessThan(OPTIONS.timeout);
        expect(prober.wakeAt).toBeGreaterThan(now);
      };
      step();
      for (const { wait, what, id } of events) {
        now += wait;
        if (what === "answer") {
          const inTime = silent.has(id) && asked.has(id) && now - silent.get(id)! < OPTIONS.timeout;
          const answered = prober.answered(id, asked.get(id) ?? 0, now);
          if (answered) {
            expect(inTime).toBe(true);
            silent.delete(id);
          }
        } else if (what === "late") expect(prober.answered(id, 0, now)).toBe(false);
        else if (what === "connect") {
          prober.connected(id);
          silent.delete(id);
        } else if (what === "disconnect" && routers.has(id)) {
          prober.disconnected(id, now);
          if (!silent.has(id)) {
            silent.set(id, now);
            asked.delete(id);
          }
        } else if (what === "leave") {
          routers.delete(id);
          step();
          silent.delete(id);
        } else if (what === "join") routers.add(id);
        else step();
      }
    }),
    { numRuns: 300, seed: 1 },
  );
  expect(found).toBeGreaterThan(100);
});

/** Answers the server's questions as clients do, while `well`. */
class Router {
  well = true;
  private seen = 0;

  constructor(
    readonly node: TestNode,
    readonly map: Awaited<ReturnType<TestNode["stream"]>>,
  ) {}

  get asked(): number {
    return this.map.messages.filter(({ PingRequest }) => PingRequest).length;
  }

  async answer(): Promise<void> {
    for (; this.seen < this.map.messages.length; this.seen++) {
      const url = this.map.messages[this.seen]!.PingRequest?.URL;
      if (!url || !this.well) continue;
      const { pathname, search } = new URL(url);
      await this.node.client.request({ method: "HEAD", path: pathname + search }, 1000, 60_000);
    }
  }
}

test("a router that stops to answer loses its subnet to the next one, and does not take it back", async () => {
  const settings = makeSettings();
  const [interval, timeout] = [3000, 2000];
  let now = Date.now();
  await using server = await TestServer.start({
    now: () => now,
    liveness: { pingAfter: 1e9, idleTimeout: 1e9 },
    settings: { ...settings, node: { ...settings.node, routes: { probeInterval: interval, probeTimeout: timeout } } },
  });
  const authKey = await server.key({ user: await server.user("alice"), reusable: true });
  const routers: Router[] = [];
  for (const name of ["r1", "r2"]) {
    const node = await server.join(name, authKey);
    const map = await node.stream();
    await node.lite({ Hostinfo: { OS: "linux", Hostname: name, RoutableIPs: ["10.0.0.0/8"] } });
    routers.push(new Router(node, map));
    await server.admin("POST", `/node/${map.self!.ID}/approve_routes`, { routes: ["10.0.0.0/8"] });
  }
  const viewer = await (await server.join("viewer", authKey)).stream();
  const [r1, r2] = routers as [Router, Router];
  const serving = () =>
    [...viewer.peers.values()].filter((peer) => peer.PrimaryRoutes?.length).map((peer) => peer.Name);
  /** One round: everybody is asked and, if well, answers; then the time for answers passes, and that until the next round. */
  const round = async (): Promise<void> => {
    const before = routers.map((router) => router.asked);
    now += interval - timeout;
    await server.control.tick();
    await until(() => routers.every((router, i) => router.asked === before[i]! + 1), "the questions");
    for (const router of routers) await router.answer();
    now += timeout;
    await server.control.tick();
  };
  // The first round was when the server started, and had nobody to ask.
  now += timeout;
  await round();
  expect(serving()).toEqual(["r1.net.test."]);
  r1.well = false;
  await round();
  await until(() => serving().join() === "r2.net.test.", "the fail-over");
  r1.well = true;
  await round();
  await round();
  expect(serving()).toEqual(["r2.net.test."]);
  // Nobody answers: the route stays where it was last, until one of them does.
  r1.well = false;
  r2.well = false;
  await round();
  await round();
  expect(serving()).toEqual(["r2.net.test."]);
  r1.well = true;
  await round();
  await until(() => serving().join() === "r1.net.test.", "the only one that is well");
});
