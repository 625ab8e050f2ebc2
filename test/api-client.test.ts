// Tailscale's official Go client, built by `bun run peers`, makes the calls of the Terraform provider and of the Kubernetes
// operator (test/peers/tailscale-api/main.go).
import { expect, test } from "bun:test";
import { makeSettings, TestServer } from "../src/control/testing.ts";
import { skip } from "./lib/mesh.ts";
import { missing, peer } from "./lib/peers.ts";

interface Step {
  step: string;
  value: unknown;
  error?: string;
  status?: number;
  data?: unknown;
}

/** The steps by name, as they come; `onStep` sees each of them. */
async function drive(
  argv: string[],
  onStep: (step: Step) => Promise<void> = async () => {},
): Promise<Map<string, Step>> {
  const child = Bun.spawn([peer("apiclient")!, ...argv], { stdout: "pipe", stderr: "inherit", stdin: "ignore" });
  const steps = new Map<string, Step>();
  let rest = "";
  for await (const chunk of child.stdout.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + chunk).split("\n");
    rest = lines.pop()!;
    for (const line of lines) {
      const step = JSON.parse(line) as Step;
      steps.set(step.step, step);
      await onStep(step);
    }
  }
  expect(await child.exited).toBe(0);
  return steps;
}

const DNS = { nameservers: ["9.9.9.9"], searchDomains: ["corp.test"], split: { "corp.test": ["10.0.0.53"] } };

async function start(): Promise<TestServer> {
  return TestServer.start({
    settings: makeSettings({
      policy: { mode: "database", path: "" },
      dns: { ...makeSettings().dns, ...DNS },
    }),
  });
}

if (skip(missing([["apiclient"]]))) test.skip("Tailscale's Go client", () => {});
else {
  test("Tailscale's Go client makes all calls of the Terraform provider", async () => {
    await using server = await start();
    const { apiKey } = await server.admin<{ apiKey: string }>("POST", "/apikey", {});
    const user = await server.user("alice");
    const node = await server.join("web", await server.key({ user, reusable: true }));
    await node.lite({ Hostinfo: { Hostname: "web", OS: "linux", RoutableIPs: ["10.0.0.0/8"] } });
    const steps = await drive([server.url, "terraform", apiKey]);
    const failed = [...steps.values()].filter(({ error }) => error !== undefined);
    expect(failed.map(({ step, status }) => [step, status])).toEqual([
      // Found by the provider in the answer, which is no error of HTTP.
      ["acl.validate failing", undefined],
      ["acl.create over another", 412],
      ["acl.create again", 412],
      ["acl.update failing", 400],
      ["device absent", 404],
      ["dns_nameservers.wrong", 400],
      ["tailnet_settings.absent", 501],
      ["oauth_client.read deleted", 404],
      ["logstream", 501],
    ]);
    const value = (step: string) => steps.get(step)!.value;
    expect(value("acl.read")).toEqual({
      HuJSON: expect.stringContaining("// Kept as it is written."),
      ETag: expect.stringMatching(/^"[0-9a-f]{64}"$/),
    });
    expect(value("acl.data")).toMatchObject({ tagOwners: { "tag:web": [] }, acls: [{ dst: ["*:*"] }] });
    expect(value("acl.update")).toMatchObject({ acls: [{ action: "accept", src: ["*"], dst: ["*:*"] }] });
    expect(steps.get("acl.update failing")!.data).toEqual([{ user: "100.64.0.1", errors: [expect.any(String)] }]);
    expect(value("tailnet_key.create")).toMatchObject({
      keyType: "auth",
      key: expect.stringMatching(/^hskey-auth-/),
      expirySeconds: 3600,
      description: "made by terraform",
    });
    expect(value("tailnet_key.read")).toMatchObject({ key: "", invalid: false });
    expect(value("tailnet_key.read deleted")).toMatchObject({ invalid: true });
    expect(value("devices")).toMatchObject([{ nodeId: "1", hostname: "web", user: "alice", authorized: true }]);
    expect(value("device by hostname")).toHaveLength(1);
    expect(value("device_key.read")).toMatchObject({ keyExpiryDisabled: false });
    expect(value("device_subnet_routes.read")).toEqual({
      advertisedRoutes: ["10.0.0.0/8"],
      enabledRoutes: ["10.0.0.0/8"],
    });
    expect(value("device_tags.read")).toMatchObject({ tags: ["tag:web"], keyExpiryDisabled: true });
    expect(value("device.attributes")).toMatchObject({
      attributes: { "custom:tier": "prod", "custom:oncall": true, "node:os": "linux" },
      expiries: { "custom:oncall": expect.any(String) },
    });
    expect(value("device")).toMatchObject({ name: "front.net.test", tags: ["tag:web"] });
    expect((value("device") as { addresses: string[] }).addresses).toContain("100.64.0.77");
    expect(value("dns_nameservers.read")).toEqual(["9.9.9.9"]);
    expect(value("dns_nameservers.read updated")).toEqual(["192.0.2.53"]);
    expect(value("dns_preferences.read")).toEqual({ magicDNS: true });
    expect(value("dns_preferences.read deleted")).toEqual({ magicDNS: false });
    expect(value("dns_search_paths.read")).toEqual(["corp.test"]);
    expect(value("dns_search_paths.read updated")).toEqual(["dev.test", "corp.test"]);
    expect(value("dns_split_nameservers.create")).toEqual({ "corp.test": ["10.0.0.53"], "dev.test": ["10.1.0.53"] });
    expect(value("dns_split_nameservers.delete")).toEqual({ "dev.test": ["10.1.0.53"] });
    expect(value("dns_configuration.read")).toEqual({
      nameservers: [{ address: "1.1.1.1", useWithExitNode: true }, { address: "9.9.9.9" }],
      searchPaths: ["b.test"],
      preferences: { overrideLocalDNS: true, magicDNS: true },
    });
    expect(value("tailnet_settings.read")).toMatchObject({ devicesApprovalOn: true, devicesKeyDurationDays: 90 });
    expect(value("users")).toMatchObject([{ id: "1", loginName: "alice", deviceCount: 0, status: "active" }]);
    expect(value("oauth_client.create")).toMatchObject({
      keyType: "client",
      key: expect.stringMatching(/^hskey-client-/),
    });
    expect(value("oauth_client.read")).toMatchObject({ scopes: ["auth_keys"], tags: ["tag:web"], description: "ci" });
    expect(value("webhook.create")).toMatchObject({ secret: expect.stringMatching(/^hskey-webhook-/) });
    expect(value("webhook.read")).toMatchObject({
      endpointUrl: "http://127.0.0.1:9/hook",
      subscriptions: ["policyUpdate"],
    });
    expect((value("webhook.read") as { secret?: string }).secret).toBeUndefined();
    expect(value("webhooks")).toHaveLength(1);
    const none = { email: "", needsVerification: false };
    expect(value("contacts.read")).toEqual({
      account: none,
      support: none,
      security: { ...none, email: "sec@example.com" },
    });
    expect(value("acl.read deleted")).toMatchObject({ HuJSON: expect.stringContaining("everybody reaches everybody") });
  }, 300_000);

  test("Tailscale's Go client makes the calls of the Kubernetes operator, with no more than a client's token", async () => {
    await using server = await start();
    const policy = { tagOwners: { "tag:operator": [], "tag:k8s": ["tag:operator"], "tag:other": [] } };
    await server.admin("PUT", "/policy", { policy: JSON.stringify(policy) });
    const local = { unix: server.control.adminSocket, method: "POST" };
    const scopes = ["devices:core", "auth_keys"];
    const made = await fetch("http://weft/api/v2/tailnet/-/keys", {
      ...local,
      body: JSON.stringify({ keyType: "client", scopes, tags: ["tag:operator"] }),
    });
    const client = (await made.json()) as { id: string; key: string };
    const steps = await drive([server.url, "operator", client.id, client.key], async ({ step, value }) => {
      if (step === "key") await server.join("proxy", (value as { key: string }).key);
    });
    expect([...steps.values()].map(({ step, status, error }) => [step, status ?? error])).toEqual([
      ["key", undefined],
      ["key of others", 403],
      ["devices", undefined],
      ["device", undefined],
      ["delete", undefined],
      ["device deleted", 404],
      ["delete again", 404],
      ["users", 403],
    ]);
    expect(steps.get("device")!.value).toMatchObject({ hostname: "proxy", tags: ["tag:k8s"], user: "tagged-devices" });
    expect((await server.admin<{ nodes: unknown[] }>("GET", "/node")).nodes).toEqual([]);
  }, 300_000);
}
