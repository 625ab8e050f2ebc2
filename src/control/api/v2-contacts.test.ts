import { expect, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { TestServer } from "../testing.ts";
import { client } from "./testing.ts";

const PATH = "/api/v2/tailnet/-/contacts";

test("contacts are kept as they are set, also over a restart; none waits for a verification", async () => {
  const dataDir = mkdtempSync(join(tmpdir(), "weft-contacts-"));
  try {
    const before = await TestServer.start({ dataDir });
    const { apiKey } = await before.admin<{ apiKey: string }>("POST", "/apikey", {});
    const api = client(before, apiKey);
    const contact = (email: string) => ({ email, needsVerification: false });
    const none = { account: contact(""), support: contact(""), security: contact("") };
    expect((await api("GET", PATH)).body).toEqual(none);
    expect((await api("PATCH", `${PATH}/security`, { email: "sec@example.com" })).status).toBe(200);
    expect((await api("PATCH", `${PATH}/support`, { email: "ops@example.com" })).status).toBe(200);
    expect((await api("PATCH", `${PATH}/support`, {})).status).toBe(200);
    for (const [what, body, status] of [
      ["billing", { email: "a@example.com" }, 400],
      ["support", { email: "no address" }, 400],
      ["support", { email: `${"x".repeat(200)}@example.com` }, 400],
    ] as const)
      expect([what, (await api("PATCH", `${PATH}/${what}`, body)).status]).toEqual([what, status]);
    const resend = await api("POST", `${PATH}/support/resend-verification-email`);
    expect([resend.status, resend.body.message]).toEqual([409, expect.stringContaining("sends no mail")]);
    await before.stop();
    await using server = await TestServer.start({ dataDir });
    expect((await client(server, apiKey)("GET", PATH)).body).toEqual({
      ...none,
      support: contact("ops@example.com"),
      security: contact("sec@example.com"),
    });
  } finally {
    rmSync(dataDir, { recursive: true, force: true });
  }
});
