// What the node keeps on disk, in tailscaled's form (spec/node-features.md, sections 3 and 8): one JSON object whose values
// are base64.
//
//   _machinekey        "privkey:<64 hex>", one per machine
//   _current-profile   "profile-<id>"
//   _profiles          JSON: id -> { ID, Name, Key, ControlURL, NodeID, UserProfile }
//   profile-<id>       JSON: Prefs, with the node keys in Config
//
// The file is 0600 in a folder of 0700 and is replaced as a whole: a crash leaves the old or the new one, never half of one.
// Keys that this version does not know stay as they are. "mem:" keeps nothing.
import {
  closeSync,
  existsSync,
  fchmodSync,
  fsyncSync,
  mkdirSync,
  openSync,
  readFileSync,
  renameSync,
  rmSync,
  writeSync,
} from "node:fs";
import { basename, dirname, join } from "node:path";
import { formatKey, hex, parseKey } from "../crypto/keys.ts";
import type { UserProfile } from "../wire/tailcfg.ts";

/** The settings of a profile. Names and defaults are tailscaled's. */
export interface Prefs {
  ControlURL: string;
  RouteAll: boolean;
  ExitNodeID: string;
  ExitNodeIP: string;
  CorpDNS: boolean;
  RunSSH: boolean;
  WantRunning: boolean;
  LoggedOut: boolean;
  ShieldsUp: boolean;
  AdvertiseTags: string[] | null;
  Hostname: string;
  AdvertiseRoutes: string[] | null;
  NoSNAT: boolean;
  NetfilterMode: number;
  OperatorUser: string;
}

export const DEFAULT_PREFS: Readonly<Prefs> = {
  ControlURL: "",
  RouteAll: false,
  ExitNodeID: "",
  ExitNodeIP: "",
  CorpDNS: true,
  RunSSH: false,
  WantRunning: false,
  LoggedOut: false,
  ShieldsUp: false,
  AdvertiseTags: null,
  Hostname: "",
  AdvertiseRoutes: null,
  NoSNAT: false,
  NetfilterMode: 2,
  OperatorUser: "",
};

/** A name that a node may ask for; "" asks for the host's own. */
export function isHostname(name: string): boolean {
  return name === "" || /^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$/.test(name);
}

/** Who the node is on its control server. Private keys are 32 bytes. */
export interface Identity {
  nodePrivate: Uint8Array;
  /** The key before the last rotation, while the server may still know it. */
  oldNodePrivate: Uint8Array | null;
  /** Set once the control server has accepted the node key. */
  user: UserProfile | null;
  /** Stable id; "" before the first netmap. */
  nodeId: string;
}

/** What was found is no state file. The message is one sentence that says what to do. */
export class StateError extends Error {
  override name = "StateError";
}

const MAX_FILE = 4 * 1024 * 1024;

/** The node's state: the machine key, and one profile with prefs and identity. Every change is on disk when the call returns. */
export class NodeState {
  readonly machinePrivate: Uint8Array;
  private readonly entries: Map<string, string>;
  private profileId: string;
  private storedPrefs: Prefs;
  private storedIdentity: Identity | null;

  /** `path`: a file, or "mem:". Throws StateError when the file cannot be read or is not what it should be. */
  constructor(
    readonly path: string,
    random: (n: number) => Uint8Array,
  ) {
    this.entries = this.inMemory ? new Map() : readEntries(path);
    const machine = this.entries.get("_machinekey");
    if (machine === undefined) {
      this.machinePrivate = random(32);
      this.entries.set("_machinekey", formatKey("privkey", this.machinePrivate));
    } else {
      this.machinePrivate = this.readKey(machine, "the machine key");
    }
    const current = /^profile-([0-9a-f]{4})$/.exec(this.entries.get("_current-profile") ?? "");
    this.profileId = current?.[1] ?? hex(random(2));
    const { prefs, identity } = this.readProfile();
    this.storedPrefs = prefs;
    this.storedIdentity = identity;
    if (machine === undefined) this.save();
  }

  /** Nothing is kept: the node registers as ephemeral. */
  get inMemory(): boolean {
    return this.path === "mem:";
  }

  get prefs(): Readonly<Prefs> {
    return this.storedPrefs;
  }

  get identity(): Readonly<Identity> | null {
    return this.storedIdentity;
  }

  setPrefs(prefs: Prefs): void {
    this.storedPrefs = { ...prefs };
    this.save();
  }

  setIdentity(identity: Identity | null): void {
    this.storedIdentity = identity;
    this.save();
  }

  private readProfile(): { prefs: Prefs; identity: Identity | null } {
    const text = this.entries.get(`profile-${this.profileId}`);
    if (text === undefined) return { prefs: { ...DEFAULT_PREFS }, identity: null };
    const value = parseObject(text);
    if (!value) throw this.corrupt(`profile-${this.profileId} is no JSON object`);
    const prefs: Record<string, unknown> = { ...DEFAULT_PREFS };
    for (const name of Object.keys(DEFAULT_PREFS)) {
      const found = value[name];
      const standard = prefs[name];
      if (standard === null ? isStrings(found) : typeof found === typeof standard) prefs[name] = found;
    }
    return { prefs: prefs as unknown as Prefs, identity: this.readIdentity(value.Config) };
  }

  private readIdentity(config: unknown): Identity | null {
    if (typeof config !== "object" || config === null) return null;
    const { PrivateNodeKey, OldPrivateNodeKey, UserProfile, NodeID } = config as Record<string, unknown>;
    if (typeof PrivateNodeKey !== "string" || isZeroKey(PrivateNodeKey)) return null;
    const hasOld = typeof OldPrivateNodeKey === "string" && OldPrivateNodeKey !== "" && !isZeroKey(OldPrivateNodeKey);
    const user = UserProfile as UserProfile | null;
    return {
      nodePrivate: this.readKey(PrivateNodeKey, "the node key"),
      oldNodePrivate: hasOld ? this.readKey(OldPrivateNodeKey, "the old node key") : null,
      user: user && typeof user.ID === "number" && user.ID > 0 ? user : null,
      nodeId: typeof NodeID === "string" ? NodeID : "",
    };
  }

  private readKey(text: string, what: string): Uint8Array {
    const key = parseKey("privkey", text);
    if (!key) throw this.corrupt(`${what} is unreadable`);
    return key;
  }

  private corrupt(what: string): StateError {
    return corruptFile(this.path, what);
  }

  private save(): void {
    if (this.inMemory) return;
    const key = `profile-${this.profileId}`;
    const { storedIdentity: identity, storedPrefs: prefs } = this;
    const config = identity && {
      PrivateNodeKey: formatKey("privkey", identity.nodePrivate),
      OldPrivateNodeKey: formatKey("privkey", identity.oldNodePrivate ?? new Uint8Array(32)),
      UserProfile: identity.user ?? { ID: 0, LoginName: "", DisplayName: "" },
      NodeID: identity.nodeId,
    };
    const before = new Map(this.entries);
    if (identity || prefs.WantRunning || prefs.ControlURL !== "") {
      this.entries.set(key, JSON.stringify({ ...prefs, Config: config }));
      this.entries.set("_current-profile", key);
      const profiles = parseObject(this.entries.get("_profiles") ?? "{}") ?? {};
      profiles[this.profileId] = {
        ID: this.profileId,
        Name: identity?.user?.LoginName ?? "",
        Key: key,
        ControlURL: prefs.ControlURL,
        NodeID: identity?.nodeId ?? "",
        UserProfile: config?.UserProfile ?? { ID: 0, LoginName: "", DisplayName: "" },
      };
      this.entries.set("_profiles", JSON.stringify(profiles));
    }
    const same = before.size === this.entries.size && [...this.entries].every(([k, v]) => before.get(k) === v);
    if (!same || !existsSync(this.path)) writeEntries(this.path, this.entries);
  }
}

function readEntries(path: string): Map<string, string> {
  let text: string;
  try {
    text = readBounded(path);
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    if (code === "ENOENT") return new Map();
    if (error instanceof StateError) throw error;
    throw new StateError(`the state file ${path} cannot be read: ${message}`);
  }
  if (text.trim() === "") return new Map();
  const object = parseObject(text);
  if (!object) throw corruptFile(path, "it is no JSON object");
  const entries = new Map<string, string>();
  for (const [key, value] of Object.entries(object)) {
    if (typeof value !== "string" || !/^[A-Za-z0-9+/]*={0,2}$/.test(value))
      throw corruptFile(path, `the value of ${JSON.stringify(key)} is no base64`);
    entries.set(key, Buffer.from(value, "base64").toString("utf8"));
  }
  return entries;
}

function readBounded(path: string): string {
  const bytes = readFileSync(path);
  if (bytes.length > MAX_FILE) throw corruptFile(path, `it has ${bytes.length} bytes`);
  return bytes.toString("utf8");
}

function writeEntries(path: string, entries: Map<string, string>): void {
  const object: Record<string, string> = {};
  for (const [key, value] of entries) object[key] = Buffer.from(value, "utf8").toString("base64");
  try {
    writeAtomically(path, `${JSON.stringify(object, null, 2)}\n`);
  } catch (error) {
    throw new StateError(`the state file ${path} cannot be written: ${(error as Error).message}`);
  }
}

/** Temporary file, fsync, rename, fsync of the folder. */
function writeAtomically(path: string, text: string): void {
  const folder = dirname(path);
  mkdirSync(folder, { recursive: true, mode: 0o700 });
  const temporary = join(folder, `.${basename(path)}.${process.pid}.tmp`);
  const file = openSync(temporary, "w", 0o600);
  try {
    fchmodSync(file, 0o600);
    writeSync(file, text);
    fsyncSync(file);
  } catch (error) {
    closeSync(file);
    rmSync(temporary, { force: true });
    throw error;
  }
  closeSync(file);
  renameSync(temporary, path);
  const directory = openSync(folder, "r");
  try {
    fsyncSync(directory);
  } finally {
    closeSync(directory);
  }
}

function corruptFile(path: string, what: string): StateError {
  return new StateError(
    `the state file ${path} is damaged (${what}): restore it from a backup, or move it away to join as a new node`,
  );
}

function parseObject(text: string): Record<string, unknown> | null {
  try {
    const value: unknown = JSON.parse(text);
    return typeof value === "object" && value !== null && !Array.isArray(value)
      ? (value as Record<string, unknown>)
      : null;
  } catch {
    return null;
  }
}

function isStrings(value: unknown): boolean {
  return value === null || (Array.isArray(value) && value.every((item) => typeof item === "string"));
}

function isZeroKey(text: string): boolean {
  return /^privkey:0{64}$/.test(text);
}
