// Where the policy comes from. In file mode an operator edits a file, which is read at the start and again on SIGHUP. In
// database mode it is set by command line and API: every version that was in force is a document of the store with who set
// it and when, the newest is in force, and old ones are dropped beyond a bound. Texts are kept byte for byte.
import { createHash } from "node:crypto";
import { readFileSync, statSync } from "node:fs";
import type { PolicyAccess } from "./access.ts";
import type { ControlContext } from "./context.ts";
import type { DocumentChange, Millis, Model } from "./model.ts";
import { MAX_POLICY_BYTES } from "./policy/hujson.ts";
import { type Policy, PolicyError } from "./policy/index.ts";
import type { ControlSettings } from "./settings.ts";

/** Versions that are kept, and how long their texts may be together; the newest is kept in any case. */
const MAX_VERSIONS = 100;
const MAX_HISTORY_BYTES = 16 << 20;
const MAX_AUTHOR = 200;

/** A version of the policy in the store; its id is its number. */
export interface PolicyRecord {
  /** HuJSON as it was given, comments and all. */
  text: string;
  /** Who set it, for people: "admin socket", "API key …". */
  by: string;
  at: Millis;
}

declare module "./model.ts" {
  interface Documents {
    policy: PolicyRecord;
  }
}

export interface PolicyVersion {
  /** Grows by one with each version; 0: of a file, or no policy at all. */
  readonly version: number;
  /** "" for no policy: everybody reaches everybody. */
  readonly text: string;
  /** Null: there is no policy. */
  readonly updatedAt: Millis | null;
  readonly by: string;
  /** SHA-256 of the text in hexadecimal. */
  readonly etag: string;
}

/** The policy cannot be set: another one came in between ("conflict"), or it is a file ("read-only"). */
export class PolicyStoreError extends Error {
  override readonly name = "PolicyStoreError";
  constructor(
    readonly kind: "conflict" | "read-only",
    message: string,
  ) {
    super(message);
  }
}

function versionOf(version: number, text: string, updatedAt: Millis | null, by: string): PolicyVersion {
  return { version, text, updatedAt, by, etag: createHash("sha256").update(text).digest("hex") };
}

/** Newest first. */
function storedVersions(model: Model): [version: number, record: PolicyRecord][] {
  const entries = [...model.documents("policy")].map(([id, record]): [number, PolicyRecord] => [Number(id), record]);
  return entries.sort(([a], [b]) => b - a);
}

function readPolicyFile(path: string): PolicyVersion {
  try {
    const { mtimeMs, size } = statSync(path);
    if (size > MAX_POLICY_BYTES)
      throw new Error(`it has ${size} bytes, more than the ${MAX_POLICY_BYTES} that are allowed`);
    return versionOf(0, readFileSync(path, "utf8"), Math.round(mtimeMs), `the file ${path}`);
  } catch (error) {
    throw new Error(`the policy file ${path} cannot be read: ${(error as Error).message}`);
  }
}

/** The policy to start with. Throws with one sentence when its file cannot be read. */
export function loadPolicy({ mode, path }: ControlSettings["policy"], model: Model): PolicyVersion {
  if (mode === "file") return path === "" ? versionOf(0, "", null, "") : readPolicyFile(path);
  const newest = storedVersions(model)[0];
  return newest ? versionOf(newest[0], newest[1].text, newest[1].at, newest[1].by) : versionOf(0, "", null, "");
}

/** Why a server cannot start with a policy, and the way out. */
export function startProblem({ version, by }: PolicyVersion, error: PolicyError): Error {
  const why = error.describe();
  if (version === 0) return new Error(`the policy of ${by} cannot be used: ${why}`);
  return new Error(
    `the stored policy (version ${version}, set by ${by}) cannot be used: ${why}\n` +
      "put a right one in its place with `weft policy set -f FILE --bypass-server-and-access-database-directly`, then start again",
  );
}

type Parts = Pick<ControlContext, "settings" | "model" | "journal" | "now" | "log" | "note" | "poke"> & {
  access: PolicyAccess;
};

export class PolicyStore {
  /** Another policy is in force. */
  onChanged: () => void = () => {};

  /** `file`: the policy in force at the start, as `loadPolicy` gave it. */
  constructor(
    private readonly parts: Parts,
    private file: PolicyVersion,
  ) {}

  private get settings(): ControlSettings["policy"] {
    return this.parts.settings.policy;
  }

  /** The policy in force, or about to be once it is durable. */
  current(): PolicyVersion {
    return this.settings.mode === "file" ? this.file : loadPolicy(this.settings, this.parts.model);
  }

  /** Newest first. Of a file only the present text is known. */
  history(): PolicyVersion[] {
    if (this.settings.mode === "file") return this.file.updatedAt === null ? [] : [this.file];
    return storedVersions(this.parts.model).map(([version, { text, at, by }]) => versionOf(version, text, at, by));
  }

  /** All that can be wrong with a policy for this tailnet, its own tests among it. Throws PolicyError. */
  check(text: string): void {
    this.parts.access.check(text);
  }

  /**
   * Puts a policy in force at once. `ifMatch`: only when the present one has this etag; "ts-default": only when none was ever
   * set. An identical policy changes nothing. Throws PolicyError or PolicyStoreError; then the old one stays.
   */
  async set(text: string, { by, ifMatch }: { by: string; ifMatch?: string | undefined }): Promise<PolicyVersion> {
    const { journal, access } = this.parts;
    if (this.settings.mode === "file") {
      const way = this.settings.path === "" ? "start the server with a policy file" : `edit ${this.settings.path}`;
      throw new PolicyStoreError(
        "read-only",
        `the policy is not in the database (policy.mode is "file"): ${way} and send SIGHUP, or set policy.mode to "database"`,
      );
    }
    const before = this.current();
    const wanted = ifMatch?.trim().replace(/^(W\/)?"(.*)"$/, "$2");
    const matches = wanted === "ts-default" ? before.version === 0 : wanted === "*" || wanted === before.etag;
    if (wanted !== undefined && !matches) {
      throw new PolicyStoreError(
        "conflict",
        `the policy is another one by now (version ${before.version}${before.by && `, set by ${before.by}`}): get it again and apply your change to it`,
      );
    }
    const policy = access.check(text);
    if (before.version > 0 && before.text === text) return before;
    const record: PolicyRecord = { text, by: by.slice(0, MAX_AUTHOR), at: this.parts.now() };
    const version = before.version + 1;
    const documents: DocumentChange[] = [{ kind: "policy", id: String(version), value: record }];
    for (const old of this.surplus(text)) documents.push({ kind: "policy", id: String(old), value: null });
    await journal.commit({ documents });
    this.put(policy);
    this.parts.note(`policy version ${version}, set by ${record.by}, is in force`);
    return versionOf(version, text, record.at, record.by);
  }

  /** Versions that a new one pushes out. */
  private surplus(text: string): number[] {
    let bytes = Buffer.byteLength(text);
    return storedVersions(this.parts.model)
      .filter(([, record], i) => {
        bytes += Buffer.byteLength(record.text);
        return i >= MAX_VERSIONS - 1 || bytes > MAX_HISTORY_BYTES;
      })
      .map(([version]) => version);
  }

  /** Reads the file again. False: the server has none. Throws PolicyError or with one sentence; then the old one stays. */
  reload(): boolean {
    if (this.settings.mode !== "file" || this.settings.path === "") return false;
    const file = readPolicyFile(this.settings.path);
    const policy = this.parts.access.check(file.text);
    const changed = file.etag !== this.file.etag;
    this.file = file;
    if (changed) this.put(policy);
    return true;
  }

  private put(policy: Policy): void {
    this.parts.access.put(policy);
    this.parts.poke();
    this.onChanged();
  }

  /** For SIGHUP: `reload`, with its outcome in the log. */
  reloadLogged(): void {
    const { path } = this.settings;
    try {
      if (this.reload()) this.parts.note(`policy ${path} is in force`);
    } catch (error) {
      const why = error instanceof PolicyError ? error.describe() : (error as Error).message;
      this.parts.log(`policy ${path} is not used, the one before stays: ${why}`);
    }
  }
}
