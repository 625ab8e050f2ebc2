import { describe, expect, test } from "bun:test";
import type { PeerStatusJson, StatusJson } from "../node/status.ts";
import { formatColumns, main, netcheckText, peerState, pongText, statusRow, stoppedText } from "./client.ts";
import { main as nodeMain, readAuthKey, statePlace } from "./node.ts";

const ZERO = "0001-01-01T00:00:00Z";
const NOW = Date.parse("2026-05-01T12:00:00Z");
const peer = (more: Partial<PeerStatusJson> = {}) =>
  ({
    DNSName: "gw.net.example.",
    HostName: "gw",
    OS: "linux",
    UserID: 7,
    TailscaleIPs: ["100.64.0.2", "fd7a::2"],
    CurAddr: "",
    Relay: "fra",
    RxBytes: 0,
    TxBytes: 0,
    LastSeen: ZERO,
    Online: true,
    Active: false,
    ExitNode: false,
    ExitNodeOption: false,
    ...more,
  }) as PeerStatusJson;
const full = (more: Partial<StatusJson> = {}) =>
  ({
    BackendState: "Running",
    AuthURL: "",
    Health: [],
    MagicDNSSuffix: "net.example",
    User: { "7": { ID: 7, LoginName: "alice@example.com", DisplayName: "Alice" } },
    ...more,
  }) as StatusJson;

describe("status", () => {
  test("a line: address, name without the suffix, owner up to @, system, state", () => {
    expect(statusRow(full(), peer(), true)).toEqual(["100.64.0.2", "gw", "alice@", "linux", "-"]);
    expect(statusRow(full({ User: {} }), peer({ DNSName: "gw.other." }), true).slice(1, 3)).toEqual(["gw.other", "-"]);
    expect(statusRow(full(), peer({ DNSName: "" }), true)[1]).toBe('("gw")');
  });

  test("the last column", () => {
    const traffic = { TxBytes: 12, RxBytes: 34 };
    expect(peerState(peer(), NOW)).toBe("-");
    expect(peerState(peer(traffic), NOW)).toBe("idle, tx 12 rx 34");
    expect(peerState(peer({ Active: true, CurAddr: "192.0.2.1:41641", ...traffic }), NOW)).toBe(
      "active; direct 192.0.2.1:41641, tx 12 rx 34",
    );
    expect(peerState(peer({ Active: true }), NOW)).toBe('active; relay "fra"');
    expect(peerState(peer({ Online: false }), NOW)).toBe("offline");
    const seen = (LastSeen: string) => peerState(peer({ Online: false, LastSeen }), NOW);
    expect(seen("2026-05-01T11:59:50Z")).toBe("offline, last seen 1m ago");
    expect(seen("2026-05-01T11:15:00Z")).toBe("offline, last seen 45m ago");
    expect(seen("2026-05-01T02:00:00Z")).toBe("offline, last seen 10h ago");
    expect(seen("2026-04-28T12:00:00Z")).toBe("offline, last seen 3d ago");
    expect(peerState(peer({ ExitNodeOption: true }), NOW)).toBe("idle; offers exit node");
  });

  test("columns are padded by two spaces, the last one is not", () => {
    expect(
      formatColumns([
        ["a", "bbb", "c"],
        ["aa", "b", "cc"],
      ]),
    ).toBe("a   bbb  c\naa  b    cc");
  });

  test("a peer's name with escape sequences, line ends or turned text stays in its cell", () => {
    expect(formatColumns([["\u001b[2Jevil\u202e\n", "x"]])).toBe("?[2Jevil??  x");
  });

  test("while the node is not up one text stands for the table", () => {
    expect(stoppedText(full())).toBeNull();
    expect(stoppedText(full({ BackendState: "Stopped" }))).toBe("Weft is stopped.");
    expect(stoppedText(full({ BackendState: "NeedsLogin", AuthURL: "http://x/y" }))).toBe(
      "Logged out.\nLog in at: http://x/y",
    );
    expect(stoppedText(full({ BackendState: "NeedsMachineAuth" }))).toContain("not yet approved");
  });
});

test("pong: direct address or relay, rounded to milliseconds", () => {
  const result = { NodeName: "gw", NodeIP: "100.64.0.2", LatencySeconds: 0.0026, Endpoint: "192.0.2.1:41641" };
  const rest = { IP: "", Err: "", DERPRegionID: 0, DERPRegionCode: "" };
  expect(pongText({ ...result, ...rest })).toBe("pong from gw (100.64.0.2) via 192.0.2.1:41641 in 3ms");
  const relayed = { ...result, ...rest, Endpoint: "", DERPRegionID: 1, DERPRegionCode: "fra" };
  expect(pongText(relayed)).toBe("pong from gw (100.64.0.2) via DERP(fra) in 3ms");
});

test("netcheck: the nearest region first, those without an answer last", () => {
  const region = (RegionID: number, RegionCode: string, RegionName: string) => ({ RegionID, RegionCode, RegionName });
  const text = netcheckText(
    {
      UDP: true,
      IPv4: true,
      IPv6: false,
      OSHasIPv6: true,
      MappingVariesByDestIP: false,
      PreferredDERP: 2,
      RegionLatency: { "2": 11_200_000 },
      GlobalV4: "192.0.2.1:5",
      GlobalV6: "",
    },
    { Regions: { "1": region(1, "a", "Alpha"), "2": region(2, "fra", "Frankfurt") } },
    new Date(NOW),
  );
  expect(text.split("\n").slice(3)).toEqual([
    "\t* UDP: true",
    "\t* IPv4: yes, 192.0.2.1:5",
    "\t* IPv6: no, but OS has support",
    "\t* MappingVariesByDestIP: false",
    "\t* PortMapping: ",
    "\t* Nearest DERP: Frankfurt",
    "\t* DERP latency:",
    "\t\t- fra: 11.2ms  (Frankfurt)",
    "\t\t-   a:         (Alpha)",
  ]);
});

describe("mistakes on the command line are one sentence", () => {
  const none = `/nonexistent/${process.pid}.sock`;
  test("no daemon: how to start it", async () => {
    for (const verb of ["status", "up", "down", "ip", "netcheck"])
      await expect(main(["--socket", none, verb])).rejects.toThrow(
        `no Weft node is running on ${none}: start one with`,
      );
  });

  test("flags", async () => {
    await expect(main(["status", "--jsn"])).rejects.toThrow('unknown flag "--jsn": did you mean --json?');
    await expect(main(["ping"])).rejects.toThrow("ping needs a host");
    await expect(main(["ip", "-4", "-6"])).rejects.toThrow("exclude each other");
    await expect(nodeMain(["-sate=x"])).rejects.toThrow('unknown flag "-sate": did you mean --state?');
    await expect(nodeMain(["--port", "70000"])).rejects.toThrow("--port 70000 is no UDP port");
    await expect(nodeMain(["--login-server", "example.com"])).rejects.toThrow("is no URL: give it as https://host");
    await expect(nodeMain(["--login-server=ftp://example.com"])).rejects.toThrow("must begin with http:// or https://");
    await expect(nodeMain(["--hostname", "a b"])).rejects.toThrow('"a b" is no host name');
    await expect(nodeMain(["--auth-key", "file:/nonexistent"])).rejects.toThrow(
      'the auth key file "/nonexistent" cannot be read',
    );
    await expect(nodeMain(["extra"])).rejects.toThrow('unexpected argument "extra"');
  });
});

test("places: a folder of our own is shut, a file's folder is not", () => {
  expect(statePlace(undefined, undefined)).toEqual({
    state: "/var/lib/weft/node/weft.state",
    stateDir: "/var/lib/weft/node",
  });
  expect(statePlace(undefined, "/a/b")).toEqual({ state: "/a/b/weft.state", stateDir: "/a/b" });
  expect(statePlace("/x/y", undefined)).toEqual({ state: "/x/y", stateDir: null });
  expect(statePlace("mem:", "/a")).toEqual({ state: "mem:", stateDir: null });
  expect(readAuthKey("hskey-auth-x")).toBe("hskey-auth-x");
});
