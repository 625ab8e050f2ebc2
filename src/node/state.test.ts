import { afterEach, describe, expect, test } from "bun:test";
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { hex } from "../crypto/keys.ts";
import { DEFAULT_PREFS, NodeState, StateError } from "./state.ts";

const folders: string[] = [];
afterEach(() => {
  for (const folder of folders.splice(0)) rmSync(folder, { recursive: true });
});
function place(): string {
  const folder = mkdtempSync(join(tmpdir(), "weft-state-"));
  folders.push(folder);
  return join(folder, "inner", "weft.state");
}
let seed = 1;
function random(n: number): Uint8Array {
  return Uint8Array.from({ length: n }, () => {
    seed = (seed * 48271) % 0x7fffffff;
    return seed & 0xff;
  });
}

/** The file as an object of decoded values. */
function decoded(path: string): Record<string, string> {
  const object = JSON.parse(readFileSync(path, "utf8")) as Record<string, string>;
  return Object.fromEntries(Object.entries(object).map(([k, v]) => [k, Buffer.from(v, "base64").toString()]));
}

describe("a new state", () => {
  test("has its machine key on disk at once, 0600 in a 0700 folder, without leftovers", () => {
    const path = place();
    const state = new NodeState(path, random);
    expect(statSync(path).mode & 0o777).toBe(0o600);
    expect(statSync(join(path, "..")).mode & 0o777).toBe(0o700);
    expect(readdirSync(join(path, ".."))).toEqual(["weft.state"]);
    expect(decoded(path)._machinekey).toBe(`privkey:${hex(state.machinePrivate)}`);
    expect(new NodeState(path, random).machinePrivate).toEqual(state.machinePrivate);
  });

  test("mem: leaves nothing", () => {
    const state = new NodeState("mem:", random);
    state.setPrefs({ ...DEFAULT_PREFS, WantRunning: true });
    expect(state.inMemory).toBe(true);
    expect(state.prefs.WantRunning).toBe(true);
  });

  test("an empty file counts as none", () => {
    const path = join(mkdtempSync(join(tmpdir(), "weft-state-")), "s");
    folders.push(join(path, ".."));
    writeFileSync(path, "");
    expect(new NodeState(path, random).machinePrivate.length).toBe(32);
  });
});

describe("identity and prefs", () => {
  test("survive a restart, in tailscaled's form", () => {
    const path = place();
    const state = new NodeState(path, random);
    const identity = {
      nodePrivate: random(32),
      oldNodePrivate: random(32),
      user: { ID: 7, LoginName: "alice@example.com", DisplayName: "Alice" },
      nodeId: "42",
    };
    state.setPrefs({ ...DEFAULT_PREFS, ControlURL: "https://c.example", WantRunning: true, Hostname: "h" });
    state.setIdentity(identity);
    const again = new NodeState(path, random);
    expect(again.identity).toEqual(identity);
    expect(again.prefs).toEqual({
      ...DEFAULT_PREFS,
      ControlURL: "https://c.example",
      WantRunning: true,
      Hostname: "h",
    });
    const file = decoded(path);
    const profile = file["_current-profile"]!;
    expect(profile).toMatch(/^profile-[0-9a-f]{4}$/);
    expect(JSON.parse(file[profile]!).Config).toMatchObject({
      PrivateNodeKey: `privkey:${hex(identity.nodePrivate)}`,
      OldPrivateNodeKey: `privkey:${hex(identity.oldNodePrivate)}`,
      NodeID: "42",
    });
    expect(JSON.parse(file._profiles!)[profile.slice(8)]).toMatchObject({
      Key: profile,
      ControlURL: "https://c.example",
    });
    again.setIdentity(null);
    expect(new NodeState(path, random).identity).toBeNull();
  });

  test("keys of other versions stay in the file", () => {
    const path = place();
    new NodeState(path, random).setPrefs({ ...DEFAULT_PREFS, WantRunning: true });
    const object = JSON.parse(readFileSync(path, "utf8"));
    writeFileSync(path, JSON.stringify({ ...object, _serve: "e30=" }));
    new NodeState(path, random).setPrefs({ ...DEFAULT_PREFS, ControlURL: "http://x" });
    expect(decoded(path)._serve).toBe("{}");
  });

  test("an unchanged value is not written again", () => {
    const path = place();
    const state = new NodeState(path, random);
    state.setPrefs({ ...DEFAULT_PREFS, WantRunning: true });
    const { ino } = statSync(path);
    state.setPrefs({ ...DEFAULT_PREFS, WantRunning: true });
    expect(statSync(path).ino).toBe(ino);
  });
});

describe("a damaged file", () => {
  test("is one sentence that says what to do, and is not overwritten", () => {
    const path = place();
    new NodeState(path, random);
    for (const text of ["{", "[]", '{"_machinekey":7}', '{"_machinekey":"eA=="}', '{"_machinekey":"%%"}']) {
      writeFileSync(path, text);
      expect(() => new NodeState(path, random)).toThrow(/is damaged \(.*\): restore it from a backup, or move it away/);
      expect(readFileSync(path, "utf8")).toBe(text);
    }
  });

  test("any bytes are either a state or a StateError", () => {
    const path = place();
    new NodeState(path, random).setPrefs({ ...DEFAULT_PREFS, WantRunning: true });
    const good = readFileSync(path);
    fc.assert(
      fc.property(fc.nat(good.length - 1), fc.integer({ min: 0, max: 255 }), (at, byte) => {
        const bytes = Buffer.from(good);
        bytes[at] = byte;
        writeFileSync(path, bytes);
        try {
          new NodeState(path, random);
        } catch (error) {
          expect(error).toBeInstanceOf(StateError);
        }
      }),
      { numRuns: 150 },
    );
  });

  test("a folder in its place is named", () => {
    const path = place();
    expect(() => new NodeState(join(path, "..", ".."), random)).toThrow("cannot be read");
  });
});
