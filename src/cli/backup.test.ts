import { Database } from "bun:sqlite";
import { afterEach, expect, spyOn, test } from "bun:test";
import {
  chmodSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { spawn } from "bun";
import { makeBackup } from "../control/backup.ts";
import { TestServer } from "../control/testing.ts";
import { main as backup } from "./backup.ts";
import { main as restore } from "./restore.ts";

const folders: string[] = [];
function folder(): string {
  const path = mkdtempSync(join(tmpdir(), "weft-backup-"));
  folders.push(path);
  return path;
}
afterEach(() => {
  for (const path of folders.splice(0)) rmSync(path, { recursive: true, force: true });
});

/** What the command prints; its error is thrown. */
async function said(main: (argv: string[]) => Promise<number>, ...argv: string[]): Promise<string> {
  const log = spyOn(console, "log").mockImplementation(() => {});
  try {
    expect(await main(argv)).toBe(0);
    return log.mock.calls.map(([line]) => String(line)).join("\n");
  } finally {
    log.mockRestore();
  }
}

async function serverWithKeys(): Promise<{ server: TestServer; derpKey: string }> {
  const derpKey = join(folder(), "relay.key");
  writeFileSync(derpKey, `privkey:${"1".repeat(64)}\n`, { mode: 0o600 });
  const server = await TestServer.start({
    backup: { keys: { "derp_private.key": derpKey }, elsewhere: ["/etc/weft/config.yaml"] },
  });
  return { server, derpKey };
}

test("a backup is one file of the owner's alone, with everything in it; it is not overwritten by mistake", async () => {
  const { server } = await serverWithKeys();
  await using _ = server;
  await server.user("alice");
  const file = join(folder(), "weft.backup");
  // Of a server that died while it made one.
  mkdirSync(join(server.dataDir, "backups"), { recursive: true, mode: 0o700 });
  writeFileSync(join(server.dataDir, "backups", "online.partial"), "half of one");
  const text = await said(backup, file, "--socket", server.control.adminSocket);
  expect(text).toContain("the database, noise_private.key, derp_private.key of http://control.test");
  expect(text).toContain("not in it: /etc/weft/config.yaml");
  expect(statSync(file).mode & 0o777).toBe(0o600);
  using database = new Database(file, { readonly: true });
  expect(database.query("SELECT name FROM users").all()).toEqual([{ name: "alice" }]);
  expect(readdirSync(join(server.dataDir, "backups"))).toEqual([]);
  await expect(backup([file, "--socket", server.control.adminSocket])).rejects.toThrow("is there already");
  await expect(backup([file, "--force", "--socket", join(server.dataDir, "none")])).rejects.toThrow(
    "no control server",
  );
  await server.user("bob");
  await said(backup, file, "--force", "--socket", server.control.adminSocket);
  using again = new Database(file, { readonly: true });
  expect(again.query("SELECT count(*) AS n FROM users").get()).toEqual({ n: 2 });
  await expect(backup([join(file, "x"), "--socket", server.control.adminSocket])).rejects.toThrow("cannot be written");
});

test("on standard output it is whole, however slowly it is read; a reader that goes away is an error", async () => {
  const { server, derpKey } = await serverWithKeys();
  await using _ = server;
  // Much more than fits into a pipe.
  writeFileSync(derpKey, Buffer.alloc(3 << 20, "x"), { mode: 0o600 });
  const program = `process.exit(await (await import(${JSON.stringify(join(import.meta.dir, "backup.ts"))})).main(process.argv.slice(1)))`;
  const pipe = async (reader: string) => {
    const line = `"$@" - --socket ${server.control.adminSocket}; echo "status $?" >&2`;
    const shell = spawn({
      cmd: ["sh", "-c", `{ ${line}; } | { ${reader}; }`, "sh", process.execPath, "-e", program],
      stderr: "pipe",
      stdout: "pipe",
    });
    const [out, errors] = await Promise.all([
      Bun.readableStreamToBytes(shell.stdout),
      Bun.readableStreamToText(shell.stderr),
    ]);
    return { out, errors };
  };
  const { out, errors } = await pipe("sleep 0.5; cat");
  expect(errors).toBe("status 0\n");
  const file = join(folder(), "weft.backup");
  writeFileSync(file, out);
  using database = new Database(file, { readonly: true });
  expect(database.query("SELECT name, length(content) AS size FROM weft_backup ORDER BY size DESC").get()).toEqual({
    name: "derp_private.key",
    size: 3 << 20,
  });
  const cut = await pipe("head -c 1 >/dev/null");
  expect(cut.errors).toContain("the backup is not whole: standard output: ");
  expect(cut.errors).not.toContain("status 0");
}, 30_000);

test("the keys of a server do not go over the network", async () => {
  const { server } = await serverWithKeys();
  await using _ = server;
  const { apiKey } = await server.admin<{ apiKey: string }>("POST", "/apikey", {});
  const answer = await fetch(`${server.url}/api/v1/backup`, {
    method: "POST",
    headers: { Authorization: `Bearer ${apiKey}` },
  });
  expect([answer.status, await answer.text()]).toEqual([403, expect.stringContaining("weft backup FILE")]);
});

test("a lost data folder is restored: same keys, same users, nodes go on without a login", async () => {
  const { server } = await serverWithKeys();
  const user = await server.user("alice");
  const key = await server.key({ user, reusable: true });
  const [web, db] = [await server.join("web", key), await server.join("db", key)];
  const file = join(folder(), "weft.backup");
  await said(backup, file, "--socket", server.control.adminSocket);
  const { noisePublicKey } = server.control;
  await server[Symbol.asyncDispose]();
  const dataDir = join(folder(), "data");
  // A copy that somebody has looked at.
  chmodSync(file, 0o644);
  expect(await said(restore, file, "--data", dataDir)).toContain("http://control.test as of ");
  for (const name of ["weft.sqlite", "noise_private.key", "derp_private.key"])
    expect([name, statSync(join(dataDir, name)).mode & 0o777]).toEqual([name, 0o600]);
  expect(readFileSync(join(dataDir, "derp_private.key"), "utf8")).toBe(`privkey:${"1".repeat(64)}\n`);
  expect(readFileSync(join(dataDir, "weft.sqlite")).includes("noise_private.key")).toBe(false);
  await using restored = await TestServer.start({ dataDir });
  expect(restored.control.noisePublicKey).toEqual(noisePublicKey);
  const again = restored.node("web", web.machinePrivate);
  again.nodeKey = web.nodeKey;
  expect((await again.stream()).peer("db")?.Key).toBe(db.nodeKey);
  // Ids are not used twice.
  expect(await restored.user("carol")).toBe(user + 1);
});

test("what is there is replaced only when that is said, never under a server that runs, and kept", async () => {
  const { server } = await serverWithKeys();
  await using _ = server;
  await server.user("alice");
  const file = join(folder(), "weft.backup");
  await said(backup, file, "--socket", server.control.adminSocket);
  await server.user("bob");
  const { dataDir } = server;
  await expect(restore([file, "--data", dataDir])).rejects.toThrow("weft.sqlite would be replaced: say --force");
  await expect(restore([file, "--data", dataDir, "--force"])).rejects.toThrow("another control server has");
  expect(readdirSync(dataDir).filter((name) => name.endsWith(".restored"))).toEqual([]);
  expect(await server.user("carol")).toBe(3);
  await server.stop();
  expect(await said(restore, file, "--data", dataDir, "--force")).toContain(join(dataDir, "backups"));
  await using restored = await TestServer.start({ dataDir });
  expect((await restored.admin<{ users: { name: string }[] }>("GET", "/user")).users.map(({ name }) => name)).toEqual([
    "alice",
  ]);
  const [kept, ...more] = readdirSync(join(dataDir, "backups"));
  expect([kept, more]).toEqual([expect.stringMatching(/^replaced-\d{8}T\d{6}Z-weft\.sqlite$/), []]);
  using old = new Database(join(dataDir, "backups", kept!), { readonly: true });
  expect(old.query("SELECT count(*) AS n FROM users").get()).toEqual({ n: 3 });
});

test("files of a database that is gone do not write into the one that is restored", async () => {
  const { server } = await serverWithKeys();
  await server.user("alice");
  const file = join(folder(), "weft.backup");
  await said(backup, file, "--socket", server.control.adminSocket);
  for (const name of ["bob", "carol"]) await server.user(name);
  // As they are after a power cut.
  const dataDir = folder();
  for (const name of ["noise_private.key", "weft.sqlite-wal"])
    copyFileSync(join(server.dataDir, name), join(dataDir, name));
  expect(statSync(join(dataDir, "weft.sqlite-wal")).size).toBeGreaterThan(0);
  await server[Symbol.asyncDispose]();
  await expect(restore([file, "--data", dataDir])).rejects.toThrow("weft.sqlite-wal would be replaced: say --force");
  await said(restore, file, "--data", dataDir, "--force");
  await using restored = await TestServer.start({ dataDir });
  expect((await restored.admin<{ users: { name: string }[] }>("GET", "/user")).users.map(({ name }) => name)).toEqual([
    "alice",
  ]);
  expect(readdirSync(join(dataDir, "backups")).some((name) => name.endsWith("-weft.sqlite-wal"))).toBe(true);
});

test("a restoration that cannot be finished leaves everything as it was", async () => {
  const { server } = await serverWithKeys();
  await server.user("alice");
  const place = folder();
  const file = join(place, "weft.backup");
  await said(backup, file, "--socket", server.control.adminSocket);
  await server.user("bob");
  await server.stop();
  const { dataDir } = server;
  const noiseKey = join(dataDir, "noise_private.key");
  writeFileSync(noiseKey, `privkey:${"2".repeat(64)}\n`, { mode: 0o600 });
  const config = join(place, "config.yaml");
  writeFileSync(config, `data_dir: ${dataDir}\nderp: {server: {private_key_path: ${join(file, "relay.key")}}}\n`);
  await expect(restore([file, "-c", config, "--force"])).rejects.toThrow("the folder of ");
  expect(readFileSync(noiseKey, "utf8")).toBe(`privkey:${"2".repeat(64)}\n`);
  expect(readdirSync(dataDir).filter((name) => name.startsWith("weft.sqlite"))).toEqual(["weft.sqlite"]);
  await using again = await TestServer.start({ dataDir });
  expect((await again.admin<{ users: unknown[] }>("GET", "/user")).users).toHaveLength(2);
});

test("a database that is damaged is moved aside, too; another key is kept beside it", async () => {
  const { server } = await serverWithKeys();
  const file = join(folder(), "weft.backup");
  await said(backup, file, "--socket", server.control.adminSocket);
  await server[Symbol.asyncDispose]();
  const dataDir = join(folder(), "data");
  mkdirSync(dataDir, { mode: 0o700 });
  writeFileSync(join(dataDir, "weft.sqlite"), "no database".repeat(1000), { mode: 0o600 });
  writeFileSync(join(dataDir, "noise_private.key"), `privkey:${"2".repeat(64)}\n`, { mode: 0o600 });
  await said(restore, file, "--data", dataDir, "--force");
  const kept = readdirSync(join(dataDir, "backups")).map((name) => name.replace(/^replaced-\w+-/, ""));
  expect(kept.sort()).toEqual(["noise_private.key", "weft.sqlite"]);
  await using restored = await TestServer.start({ dataDir });
  expect(restored.control.noisePublicKey).toEqual(server.control.noisePublicKey);
});

test("of a server with PostgreSQL the keys alone are in it, and that is said", async () => {
  const place = folder();
  const file = join(place, "keys");
  const key = join(place, "key");
  writeFileSync(key, `privkey:${"3".repeat(64)}\n`, { mode: 0o600 });
  await makeBackup(file, {
    store: { snapshot: null, place: "the PostgreSQL database weft at db.test" },
    keys: { "noise_private.key": key, "derp_private.key": join(place, "absent") },
    serverUrl: "https://weft.test",
    elsewhere: [],
    now: 0,
  });
  expect(statSync(file).mode & 0o777).toBe(0o600);
  const dataDir = join(place, "data");
  await expect(restore([file, "--data", dataDir])).rejects.toThrow("it was in the PostgreSQL database weft at db.test");
  const config = join(place, "config.yaml");
  writeFileSync(
    config,
    `data_dir: ${dataDir}\ndatabase: {type: postgres, postgres: {host: db.test, name: weft, user: weft}}\n`,
  );
  expect(await said(restore, file, "-c", config)).toContain("restore that with pg_restore");
  expect(readdirSync(dataDir)).toEqual(["noise_private.key"]);
});

test("what is no backup, damaged, or of a newer Weft is refused before anything changes", async () => {
  const { server } = await serverWithKeys();
  await using _ = server;
  const place = folder();
  const file = join(place, "good");
  await said(backup, file, "--socket", server.control.adminSocket);
  const dataDir = join(place, "data");
  const refused = async (content: Uint8Array | string, why: string) => {
    const path = join(place, "bad");
    writeFileSync(path, content);
    await expect(restore([path, "--data", dataDir])).rejects.toThrow(why);
  };
  const good = readFileSync(file);
  await refused("text", "cannot be used");
  await refused("text that is long enough ".repeat(500), "no backup that Weft made");
  await refused(good.subarray(0, good.length - 4096), "cannot be used");
  // A page of the middle, which nothing else would have read.
  const page = new Uint8Array(good);
  const at = Math.floor(good.length / 4096 / 2) * 4096;
  page.fill(0xff, at, at + 4096);
  await refused(page, "it is damaged");
  const newer = join(place, "bad");
  writeFileSync(newer, good);
  {
    using database = new Database(newer);
    database.run("INSERT INTO kysely_migration VALUES ('9999-later', 'now')");
  }
  await expect(restore([newer, "--data", dataDir])).rejects.toThrow("made by a newer Weft");
  {
    using database = new Database(newer);
    database.run("DROP TABLE weft_backup");
  }
  await expect(restore([newer, "--data", dataDir])).rejects.toThrow("no backup that Weft made");
  expect(existsSync(dataDir)).toBe(false);
});
