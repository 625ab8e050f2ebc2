import { expect, test } from "bun:test";
import { PolicyAccess } from "./access.ts";
import { clientVersion, warningChange, warningsOf } from "./client-advice.ts";
import { type Change, Model } from "./model.ts";
import { View } from "./netmap.ts";
import { parsePolicy } from "./policy/index.ts";
import { makeConfig, makeNode, makeSettings, makeUser, TestServer, until } from "./testing.ts";

const DAY = 24 * 60 * 60_000;
const NOW = Date.UTC(2026, 0, 1);

test("a node is told what its user or an administrator can mend, and when it is mended", () => {
  const routes = ["10.1.0.0/16", "10.2.0.0/16", "10.3.0.0/16", "10.4.0.0/16", "10.5.0.0/16", "10.6.0.0/16"];
  const broken = makeNode(7, { authorized: true, hostinfo: { RoutableIPs: routes }, expiry: NOW + 6 * DAY });
  const warnings = warningsOf(broken, false, NOW);
  expect([...warnings].map(([id, { Text }]) => [id, Text])).toEqual([
    ["weft-no-name", expect.stringContaining("weft nodes rename -i 7 NAME")],
    ["weft-routes-unapproved", expect.stringMatching(/10\.1\.0\.0\/16, .*10\.5\.0\.0\/16 and 1 more until/)],
    ["weft-key-expires", expect.stringContaining("2026-01-07 00:00 UTC")],
  ]);
  const waiting = warningsOf({ ...broken, authorized: false, expiry: NOW + 8 * DAY }, true, NOW);
  expect([...waiting.keys()]).toEqual(["weft-not-authorized"]);
  expect(waiting.get("weft-not-authorized")!.Text).toContain("weft nodes authorize -i 7");
  // What has expired is no warning any more: the client asks for a login.
  expect(warningsOf({ ...broken, expiry: NOW }, true, NOW).has("weft-key-expires")).toBe(false);

  const fewer = warningsOf({ ...broken, approvedRoutes: routes.slice(1) }, false, NOW);
  expect(warningChange(warnings, fewer, 117).DisplayMessages).toEqual({
    "weft-routes-unapproved": {
      Title: expect.any(String),
      Text: expect.stringContaining("the routes 10.1.0.0/16 until"),
      Severity: "low",
    },
  });
  const none = warningsOf(makeNode(7), true, NOW);
  expect(warningChange(fewer, none, 117).DisplayMessages).toEqual({
    "weft-no-name": null,
    "weft-routes-unapproved": null,
    "weft-key-expires": null,
  });
  expect(warningChange(none, waiting, 116)).toEqual({ Health: [waiting.get("weft-not-authorized")!.Text!] });
  expect(warningChange(waiting, none, 116)).toEqual({ Health: [] });
  expect(warningChange(waiting, waiting, 117)).toEqual({});
});

test("warnings ride on the map stream: what holds at first, then what changes", () => {
  const model = new Model();
  const access = new PolicyAccess(model, parsePolicy(""));
  const view = new View(1, makeConfig(), access);
  const commit = (change: Change) => {
    const effect = model.apply(change);
    access.onApplied(effect);
    return view.next(model, NOW)?.DisplayMessages;
  };
  const node = makeNode(1, { cap: 117, hostinfo: { RoutableIPs: ["10.0.0.0/24"] } });
  expect(Object.keys(commit({ users: [makeUser(1)], nodes: [node] })!)).toEqual(["weft-routes-unapproved"]);
  expect(commit({ nodes: [{ ...node, endpoints: ["192.0.2.1:1"] }] })).toBeUndefined();
  expect(commit({ nodes: [{ ...node, approvedRoutes: ["10.0.0.0/24"] }] })).toEqual({ "weft-routes-unapproved": null });
});

test("a key that comes near its end is told of as time passes, and no more when it is put off", async () => {
  let now = NOW;
  await using server = await TestServer.start({ now: () => now });
  const user = await server.user("alice");
  const node = await server.join("desk", await server.key({ user }));
  const id = 1;
  await server.admin("POST", `/node/${id}/expire`, { expiry: new Date(NOW + 30 * DAY).toISOString() });
  const stream = await node.stream({ Version: 130 });
  const told = () => stream.messages.flatMap(({ DisplayMessages }) => Object.entries(DisplayMessages ?? {}));
  now += 22 * DAY;
  await server.control.tick();
  expect(told()).toEqual([]);
  now += 2 * DAY;
  await server.control.tick();
  await until(() => told().length === 1, "the warning");
  expect(told()).toEqual([["weft-key-expires", expect.objectContaining({ Severity: "medium" })]]);
  await server.admin("POST", `/node/${id}/expire`, { disableExpiry: true });
  await until(() => told().length === 2, "the end of the warning");
  expect(told()[1]).toEqual(["weft-key-expires", null]);
});

test("clients hear of newer ones only where the operator names one, and Weft's own nodes never", () => {
  const clients = { latestVersion: "1.102.5", urgentBelow: "", updateUrl: "" };
  const tell = (IPNVersion: string, more: Partial<typeof clients> = {}, App?: string) =>
    clientVersion(makeNode(1, { hostinfo: { IPNVersion, ...(App && { App }) } }), { ...clients, ...more });
  expect(clientVersion(makeNode(1, { hostinfo: { IPNVersion: "1.80.3" } }), makeSettings().clients)).toBeNull();
  expect(tell("1.80.3-t1234-gabcd")).toEqual({ LatestVersion: "1.102.5" });
  expect(["1.102.5", "1.102.10-t1", "1.103.0", "2.0.0"].map((version) => tell(version))).toEqual(
    Array(4).fill({ RunningLatest: true }),
  );
  expect([tell("1.9.200")?.LatestVersion, tell("1.102.4")?.LatestVersion]).toEqual(["1.102.5", "1.102.5"]);
  expect(tell("1.98.1", { urgentBelow: "1.98.2", updateUrl: "https://get.test" })).toEqual({
    LatestVersion: "1.102.5",
    UrgentSecurityUpdate: true,
    Notify: true,
    NotifyURL: "https://get.test",
    NotifyText: "1.102.5 is there, this is 1.98.1.",
  });
  expect(tell("1.98.2", { urgentBelow: "1.98.2" })).not.toHaveProperty("UrgentSecurityUpdate");
  expect([tell("0.1.0", {}, "weft"), tell("what"), tell("")]).toEqual([null, null, null]);
});
