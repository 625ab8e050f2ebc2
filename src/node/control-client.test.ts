import { afterEach, describe, expect, test } from "bun:test";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { formatKey, randomBytes } from "../crypto/keys.ts";
import { x25519Public } from "../crypto/x25519.ts";
import type { Node } from "../wire/tailcfg.ts";
import { ControlClient, type ControlClientOptions, type LoginState } from "./control-client.ts";
import { FixtureControl, type MapStream } from "./control-server.fixture.ts";
import type { Netmap } from "./netmap.ts";
import type { Identity } from "./state.ts";

const closers: (() => Promise<void>)[] = [];
afterEach(async () => {
  for (const close of closers.splice(0).reverse()) await close();
});

async function startControl(port = 0): Promise<FixtureControl> {
  const control = await FixtureControl.start(port);
  closers.push(() => control.close());
  control.onStream = (stream) => stream.send({ Node: selfNode(stream), PacketFilter: [] });
  return control;
}

function selfNode(stream: MapStream, more: Partial<Node> = {}): Node {
  return {
    ID: 1,
    StableID: "1",
    Name: "me.net.example.",
    User: 1,
    Key: stream.request.NodeKey ?? "",
    Addresses: ["100.64.0.1/32"],
    MachineAuthorized: true,
    ...more,
  };
}

function startClient(control: FixtureControl, options: Partial<ControlClientOptions> = {}) {
  const seen = {
    identities: [] as Identity[],
    logins: [] as LoginState[],
    netmap: null as Netmap | null,
    netmaps: 0,
    connected: [] as boolean[],
    logs: [] as string[],
  };
  const client = new ControlClient(
    {
      serverUrl: control.url,
      machinePrivate: randomBytes(32),
      identity: null,
      authKey: "key-1",
      ephemeral: false,
      discoPublic: x25519Public(randomBytes(32)),
      hostinfo: { OS: "linux", Hostname: "me" },
      randomBytes,
      now: Date.now,
      ...options,
    },
    {
      onIdentity: (identity) => seen.identities.push(identity),
      onLogin: (state) => seen.logins.push(state),
      onNetmap: (netmap) => {
        seen.netmap = netmap;
        seen.netmaps++;
      },
      onConnected: (connected) => seen.connected.push(connected),
      onPing: async (type, ip) => ({ Type: type, IP: ip }),
      log: (_level, message) => seen.logs.push(message),
    },
  );
  closers.push(() => client.stop());
  client.start();
  return { client, seen };
}

async function until(condition: () => boolean, what: string): Promise<void> {
  const deadline = Date.now() + 60_000;
  while (!condition()) {
    if (Date.now() > deadline) throw new Error(`not within a minute: ${what}`);
    await Bun.sleep(3);
  }
}

const nodeKeyText = (identity: Identity) => formatKey("nodekey", x25519Public(identity.nodePrivate));
const known = (): Identity => ({
  nodePrivate: randomBytes(32),
  oldNodePrivate: null,
  user: { ID: 1, LoginName: "alice" },
  nodeId: "1",
});

describe("login", () => {
  test("a new node registers with the auth key; its identity is on disk before the server hears of it", async () => {
    const control = await startControl();
    let onDisk: Identity | undefined;
    control.onRegister = () => {
      onDisk = seen.identities.at(-1);
      return { User: { ID: 7 }, Login: { ID: 7, LoginName: "alice" } };
    };
    const { seen } = startClient(control);
    await until(() => seen.netmap !== null, "the netmap");
    expect(control.registers).toHaveLength(1);
    const [request] = control.registers;
    expect(request?.Auth?.AuthKey).toBe("key-1");
    expect(onDisk && nodeKeyText(onDisk)).toBe(request?.NodeKey as string);
    expect(seen.identities.find(({ user }) => user !== null)?.user).toEqual({
      ID: 7,
      LoginName: "alice",
      DisplayName: "",
    });
    expect(seen.logins.at(-1)).toEqual({ kind: "in" });
    expect(seen.netmap?.self.Addresses).toEqual(["100.64.0.1/32"]);
  });

  test("a known node registers without the key that it was given once", async () => {
    const control = await startControl();
    const identity = known();
    const { seen } = startClient(control, { identity });
    await until(() => seen.netmap !== null, "the netmap");
    expect(control.registers).toHaveLength(1);
    expect(control.registers[0]?.Auth).toBeUndefined();
    expect(control.registers[0]?.NodeKey).toBe(nodeKeyText(identity));
  });

  test("a known node that the server wants to authenticate uses the key after all", async () => {
    const control = await startControl();
    control.onRegister = (request) =>
      request.Auth?.AuthKey ? { User: { ID: 1 } } : { AuthURL: "http://x/register/1" };
    const { seen } = startClient(control, { identity: known() });
    await until(() => seen.netmap !== null, "the netmap");
    expect(control.registers.map((request) => request.Auth?.AuthKey)).toEqual([undefined, "key-1"]);
  });

  test("a refused key is said in a sentence, without hammering; a better key lets the node in", async () => {
    const control = await startControl();
    control.onRegister = (request) =>
      request.Auth?.AuthKey === "good" ? { User: { ID: 1 } } : { Error: "authkey expired" };
    const { client, seen } = startClient(control);
    await until(() => seen.logins.length > 0, "the refusal");
    expect(seen.logins.at(-1)).toEqual({
      kind: "needs-login",
      authUrl: "",
      error: "the control server does not let this node in: authkey expired",
    });
    await Bun.sleep(300);
    expect(control.registers).toHaveLength(1);
    client.retryLogin("good");
    await until(() => seen.netmap !== null, "the netmap");
  });

  test("status 401 with a text is a refusal, status 500 is tried again", async () => {
    const control = await startControl();
    let answers = 0;
    control.onRegister = () => (++answers === 1 ? 500 : 401);
    const { seen } = startClient(control);
    await until(() => seen.logins.length > 0, "the refusal");
    expect(answers).toBe(2);
    expect(seen.logins.at(-1)?.kind).toBe("needs-login");
  });

  test("a stream that ends without an answer is a failure, and is tried again", async () => {
    const control = await startControl();
    control.onRegister = () => (control.registers.length === 1 ? 0 : { User: { ID: 1 } });
    const { seen } = startClient(control);
    await until(() => seen.netmap !== null, "the netmap");
    expect(control.registers).toHaveLength(2);
  });

  test("an expired node key is replaced: new key, old key named, one more request", async () => {
    const control = await startControl();
    const identity = known();
    const old = nodeKeyText(identity);
    control.onRegister = (request) => (request.NodeKey === old ? { NodeKeyExpired: true } : { User: { ID: 1 } });
    const { seen } = startClient(control, { identity });
    await until(() => seen.netmap !== null, "the netmap");
    expect(control.registers).toHaveLength(2);
    expect(control.registers[1]?.OldNodeKey).toBe(old);
    expect(control.registers[1]?.NodeKey).not.toBe(old);
    expect(nodeKeyText(seen.identities.at(-1)!)).toBe(control.registers[1]!.NodeKey!);
  });

  test("a server that calls every key expired is not asked for ever", async () => {
    const control = await startControl();
    control.onRegister = () => ({ NodeKeyExpired: true });
    const { seen } = startClient(control, { identity: known() });
    await until(() => seen.logins.length > 0, "the end of it");
    expect(seen.logins.at(-1)?.kind).toBe("needs-login");
    expect(control.registers).toHaveLength(2);
  });

  test("a self node whose key has expired leads to a new key when there is an auth key", async () => {
    const control = await startControl();
    control.onStream = (stream) => {
      const isNew = control.registers.length > 1;
      stream.send({ Node: selfNode(stream, isNew ? {} : { KeyExpiry: "2020-01-01T00:00:00Z" }) });
    };
    const { seen } = startClient(control);
    await until(() => seen.logins.at(-1)?.kind === "in" && control.registers.length === 2, "the new login");
    expect(control.registers[1]?.OldNodeKey).toBe(control.registers[0]?.NodeKey as string);
  });

  test("without a key a person decides: the URL is shown and followed until the answer comes", async () => {
    const control = await startControl();
    const url = `${control.url}/register/abc`;
    let approved = false;
    control.onRegister = (request) => (request.Followup && approved ? { User: { ID: 1 } } : { AuthURL: url });
    const { seen } = startClient(control, { authKey: "" });
    await until(() => seen.logins.some((login) => login.kind === "needs-login" && login.authUrl === url), "the URL");
    approved = true;
    await until(() => seen.netmap !== null, "the netmap");
    expect(control.registers.at(-1)?.Followup).toBe(url);
  });

  test("a key that comes while a person is awaited is used at once", async () => {
    const control = await startControl();
    control.onRegister = (request) => {
      if (request.Auth) return { User: { ID: 1 } };
      // As servers do: the follow-up is held until someone decides.
      return request.Followup ? null : { AuthURL: `${control.url}/register/abc` };
    };
    const { client, seen } = startClient(control, { authKey: "" });
    await until(() => control.registers.some(({ Followup }) => Followup !== ""), "the follow-up");
    client.retryLogin("key-2");
    await until(() => seen.netmap !== null, "the netmap");
    expect(control.registers.at(-1)?.Auth?.AuthKey).toBe("key-2");
  });

  test("a key that comes while another is being refused is used at once", async () => {
    const control = await startControl();
    control.onRegister = (request) => {
      if (request.Auth?.AuthKey === "key-2") return { User: { ID: 1 } };
      client.retryLogin("key-2");
      return { Error: "authkey expired" };
    };
    const { client, seen } = startClient(control);
    await until(() => seen.netmap !== null, "the netmap");
    expect(control.registers.map(({ Auth }) => Auth?.AuthKey)).toEqual(["key-1", "key-2"]);
  });

  test("a known node that is refused asks again after a while", async () => {
    const control = await startControl();
    control.onRegister = () => (control.registers.length < 3 ? 403 : { User: { ID: 1 } });
    const { seen } = startClient(control, { identity: known(), authKey: "", askAgain: 20 });
    await until(() => seen.netmap !== null, "the netmap");
    expect(seen.logins.map(({ kind }) => kind)).toEqual(["needs-login", "needs-login", "in"]);
  });
});

describe("the map stream", () => {
  test("deltas arrive; keep-alives change nothing", async () => {
    const control = await startControl();
    const { seen } = startClient(control);
    await until(() => seen.netmap !== null, "the netmap");
    const before = seen.netmaps;
    control.streams[0]!.send({ KeepAlive: true });
    control.streams[0]!.send({ PeersChanged: [{ ID: 2, Key: "nodekey:2" }] });
    await until(() => seen.netmap?.peers.size === 1, "the peer");
    expect(seen.netmaps).toBe(before + 1);
  });

  test("endpoints and NetInfo go out as lite updates, once the stream is up, and again after a reconnect", async () => {
    const control = await startControl();
    const { client, seen } = startClient(control);
    client.setEndpoints(["192.0.2.1:41641"], [1]);
    client.setNetInfo({ PreferredDERP: 5 });
    await until(() => control.updates.some((update) => update.Hostinfo?.NetInfo?.PreferredDERP === 5), "the update");
    const update = control.updates.at(-1)!;
    expect(update.Endpoints).toEqual(["192.0.2.1:41641"]);
    expect(update.EndpointTypes).toEqual([1]);
    expect(update.OmitPeers).toBe(true);
    expect(update.Stream).toBeFalsy();
    const count = control.updates.length;
    control.cut();
    await until(() => control.updates.length > count, "the update after the reconnect");
    expect(seen.connected.slice(0, 3)).toEqual([true, false, true]);
  });

  test("a server that comes back with another Noise key is joined again, the netmap stays meanwhile", async () => {
    const control = await startControl();
    const { seen } = startClient(control);
    await until(() => seen.netmap !== null, "the netmap");
    control.changeKey();
    control.cut();
    await until(() => control.streams.length === 2, "the second stream");
    expect(seen.netmap).not.toBeNull();
    expect(control.registers).toHaveLength(1);
  });

  test("a wait ends when there is reason to try again", async () => {
    const control = await startControl();
    const { port } = control;
    await control.close();
    const { client, seen } = startClient(control);
    // Left to its back-off the client would need a minute for so many attempts.
    for (let attempts = 1; attempts <= 15; attempts++) {
      await until(() => seen.logs.length >= attempts, `attempt ${attempts}`);
      client.hurry();
    }
    const again = await startControl(port);
    client.hurry();
    await until(() => again.streams.length === 1, "the stream");
  });

  test("a node that was deleted registers again; with its key it is let in as before", async () => {
    const control = await startControl();
    const { seen } = startClient(control);
    await until(() => seen.netmap !== null, "the netmap");
    let deleted = true;
    control.onMap = () => (deleted ? 404 : 200);
    control.onRegister = (request) => {
      if (!request.Auth) return { AuthURL: "http://x/register/1" };
      deleted = false;
      return { User: { ID: 1 } };
    };
    control.streams[0]!.end();
    await until(() => control.streams.length === 2, "the second stream");
    expect(control.registers.at(-1)?.Auth?.AuthKey).toBe("key-1");
  });

  test("a stream that falls silent is given up", async () => {
    const control = await startControl();
    const { seen } = startClient(control, { watchdog: 200 });
    await until(() => control.streams.length >= 2, "the second stream");
    expect(seen.logs.join()).toContain("silent");
  });

  test("garbage on the stream ends it in one sentence, and the client comes back", async () => {
    const control = await startControl();
    const { seen } = startClient(control);
    await until(() => seen.netmap !== null, "the netmap");
    control.streams[0]!.sendBytes(new Uint8Array(40).fill(7));
    await until(() => control.streams.length === 2, "the second stream");
    expect(seen.logs.join()).toContain("does not decompress");
  });

  test("a first message without a node is refused", async () => {
    const control = await startControl();
    control.onStream = (stream) =>
      stream.send(control.streams.length === 1 ? { Peers: [] } : { Node: selfNode(stream) });
    const { seen } = startClient(control);
    await until(() => seen.netmap !== null, "the netmap of the second stream");
    expect(seen.logs.join()).toContain("has no node for this machine");
  });
});

describe("requests of the server", () => {
  test("a ping is answered by HEAD through Noise, once per URL; c2n echo and disco by POST", async () => {
    const control = await startControl();
    const { seen } = startClient(control);
    await until(() => seen.netmap !== null, "the netmap");
    const stream = control.streams[0]!;
    const ping = { URL: "https://unused/machine/ping-response?id=1", URLIsNoise: true };
    stream.send({ PingRequest: ping });
    stream.send({ KeepAlive: true, PingRequest: ping });
    await until(() => control.others.length === 1, "the answer");
    expect(control.others[0]?.request).toBe("HEAD /machine/ping-response?id=1");
    const Payload = Buffer.from("POST /echo HTTP/1.1\r\nHost: x\r\n\r\nhello").toString("base64");
    stream.send({ PingRequest: { URL: "https://unused/c2n/7", URLIsNoise: true, Types: "c2n", Payload } });
    await until(() => control.others.length === 2, "the echo");
    expect(control.others[1]?.request).toBe("POST /c2n/7");
    expect(Buffer.from(control.others[1]!.body).toString()).toMatch(/^HTTP\/1\.1 200 OK\r\n[\s\S]*\r\n\r\nhello$/);
    stream.send({ PingRequest: { URL: "https://unused/p/8", URLIsNoise: true, Types: "disco", IP: "100.64.0.2" } });
    await until(() => control.others.length === 3, "the ping's answer");
    expect(JSON.parse(Buffer.from(control.others[2]!.body).toString())).toEqual({ Type: "disco", IP: "100.64.0.2" });
  });

  test("an answer outside Noise goes to the control server only", async () => {
    const control = await startControl();
    const { seen } = startClient(control);
    await until(() => seen.netmap !== null, "the netmap");
    control.streams[0]!.send({ PingRequest: { URL: "http://192.0.2.1:1/secret" } });
    await until(() => seen.logs.some((line) => line.includes("is not the control server")), "the refusal");
  });

  test("logout tells the server an expiry in the past", async () => {
    const control = await startControl();
    const { client, seen } = startClient(control);
    await until(() => seen.netmap !== null, "the netmap");
    await client.logout();
    expect(control.registers.at(-1)?.Expiry).toBe("1970-01-01T00:02:03Z");
  });
});

describe("servers that are none", () => {
  const key = JSON.stringify({ publicKey: `mkey:${"11".repeat(32)}` });
  const sentences: [what: string, answer: (path: string) => [status: number, body: string], sentence: string][] = [
    ["a web server", () => [200, "hello"], "is no JSON"],
    ["a server without a key", () => [200, "{}"], "names no public key"],
    ["an error page", () => [503, ""], "status 503"],
    ["an endless page", () => [200, "x".repeat(100_000)], "more than 65536 bytes"],
    [
      "a server that does not upgrade",
      (path) => (path.startsWith("/key") ? [200, key] : [404, "nothing here"]),
      "answered /ts2021 with status 404",
    ],
  ];
  for (const [what, answer, sentence] of sentences)
    test(`${what} is named in one sentence, again and again but not at once`, async () => {
      const server = createServer((request, response) => {
        const [status, body] = answer(request.url!);
        response.writeHead(status).end(body);
      });
      await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
      closers.push(async () => {
        server.closeAllConnections();
        server.close();
      });
      const { port } = server.address() as AddressInfo;
      const { seen } = startClient({ url: `http://127.0.0.1:${port}` } as FixtureControl);
      await until(() => seen.logs.length >= 2, "two attempts");
      expect(seen.logs[0]).toContain(sentence);
      expect(seen.logs[0]).not.toContain("\n");
    });
});
