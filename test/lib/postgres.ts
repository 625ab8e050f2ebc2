// A PostgreSQL server for one test file: its own data folder, a unix socket and no network, ended with the test.
import { chmodSync, chownSync, globSync, mkdtempSync, rmSync } from "node:fs";
import { userInfo } from "node:os";
import { join } from "node:path";
import type { PostgresSettings } from "../../src/control/store-postgres.ts";
import { until } from "./mesh.ts";

const USER = "weft";

function programs(): string | null {
  const found = globSync("/usr/lib/postgresql/*/bin/initdb").sort();
  return found.at(-1)?.replace(/\/initdb$/, "") ?? null;
}

/** Reason why no server can run here, or null. */
export const cannotRunPostgres: string | null = programs()
  ? null
  : "PostgreSQL is not installed (apt install postgresql)";

/** initdb and the server refuse to run as root: then they run as the user that the package has made. */
function unprivileged(): { prefix: string[]; ids: [number, number] | null } {
  if (userInfo().uid !== 0) return { prefix: [], ids: null };
  const id = (flag: string) => Number(Bun.spawnSync(["id", flag, "postgres"]).stdout.toString());
  return {
    prefix: ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"],
    ids: [id("-u"), id("-g")],
  };
}

export class PostgresServer implements AsyncDisposable {
  private child: Bun.Subprocess | null = null;

  private constructor(private readonly folder: string) {}

  static async start(): Promise<PostgresServer> {
    // Unix sockets bound the length of their paths: short, and not below a long TMPDIR.
    const folder = mkdtempSync("/tmp/weft-pg-");
    const { prefix, ids } = unprivileged();
    chmodSync(folder, 0o700);
    if (ids) chownSync(folder, ...ids);
    const server = new PostgresServer(folder);
    const data = join(folder, "data");
    const init = Bun.spawnSync(
      [...prefix, join(programs()!, "initdb"), "-D", data, "-U", USER, "-A", "trust", "--no-sync", "-E", "UTF8"],
      { cwd: "/", stderr: "pipe" },
    );
    if (!init.success) throw new Error(`initdb failed: ${init.stderr.toString()}`);
    await server.run();
    return server;
  }

  /** Starts the server, for the first time or again after `kill`. */
  async run(): Promise<void> {
    const data = join(this.folder, "data");
    this.child = Bun.spawn(
      [
        ...unprivileged().prefix,
        join(programs()!, "postgres"),
        "-D",
        data,
        "-k",
        this.folder,
        "-c",
        "listen_addresses=",
      ],
      { cwd: "/", stdin: "ignore", stdout: "ignore", stderr: "ignore" },
    );
    await until("PostgreSQL answers", () => this.query("select 1"), 30);
  }

  /** Ends all its processes at once, as a crash would. */
  async kill(): Promise<void> {
    // SIGQUIT is the server's "immediate": no checkpoint, no goodbye.
    this.child?.kill("SIGQUIT");
    await this.child?.exited;
  }

  /** A database of its own for each caller. */
  async database(): Promise<PostgresSettings> {
    const name = `weft_${crypto.randomUUID().replaceAll("-", "")}`;
    await this.query(`create database ${name}`);
    return this.settings(name);
  }

  async query<T>(text: string, database = "postgres"): Promise<T[]> {
    const { host, user } = this.settings(database);
    const sql = new Bun.SQL({ adapter: "postgres", path: host, port: 5432, username: user, database, max: 1 });
    try {
      return [...(await sql.unsafe(text))] as T[];
    } finally {
      await sql.close({ timeout: 0 });
    }
  }

  private settings(database: string): PostgresSettings {
    return { type: "postgres", host: this.folder, port: 5432, database, user: USER, password: "", ssl: "disable" };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.kill();
    rmSync(this.folder, { recursive: true, force: true });
  }
}
