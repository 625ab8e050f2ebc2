// Private keys on disk: one line "privkey:<64 hex digits>", mode 0600, written whole or not at all.
import { closeSync, fsyncSync, openSync, readFileSync, renameSync, statSync, writeSync } from "node:fs";
import { dirname } from "node:path";
import { formatKey, parseKey } from "../crypto/keys.ts";

/** Bytes of a secret in a file. */
const MAX_SECRET = 64 * 1024;

/** Text of a file with one secret, without the line's end. Throws with one sentence, also when everybody may read the file. */
export function readSecretFile(path: string): string {
  let text: string;
  try {
    const { mode, size } = statSync(path);
    refusePublic(mode);
    if (size > MAX_SECRET) throw new Error(`it is larger than ${MAX_SECRET} bytes`);
    text = readFileSync(path, "utf8").replace(/\r?\n$/, "");
    if (text === "") throw new Error("it is empty");
  } catch (error) {
    throw new Error(`the secret file ${path} cannot be used: ${(error as Error).message}`);
  }
  return text;
}

function refusePublic(mode: number): void {
  if ((mode & 0o007) !== 0)
    throw new Error(`everybody on this machine may use it (mode ${(mode & 0o777).toString(8)}): chmod 0640 or less`);
}

/** The key in `path`; makes it from `generate` when there is no such file. Throws with one sentence. */
export function loadOrCreateKey(path: string, generate: () => Uint8Array): Uint8Array {
  let text: string;
  try {
    refusePublic(statSync(path).mode);
    text = readFileSync(path, "utf8");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOENT")
      throw new Error(`the key file ${path} cannot be read: ${(error as Error).message}`);
    const key = generate();
    writeAtomically(path, `${formatKey("privkey", key)}\n`);
    return key;
  }
  const key = parseKey("privkey", text.trim());
  if (!key || key.every((byte) => byte === 0))
    throw new Error(
      `the key file ${path} is damaged: it must hold "privkey:" and 64 hex digits; restore it from a backup (a new key would strand the clients that know this one)`,
    );
  return key;
}

/** Durable when it returns: the file has its old content or the new one, never less. */
export function writeAtomically(path: string, content: string): void {
  const temporary = `${path}.new`;
  try {
    const file = openSync(temporary, "w", 0o600);
    try {
      writeSync(file, content);
      fsyncSync(file);
    } finally {
      closeSync(file);
    }
    renameSync(temporary, path);
    const folder = openSync(dirname(path), "r");
    try {
      fsyncSync(folder);
    } finally {
      closeSync(folder);
    }
  } catch (error) {
    throw new Error(`${path} cannot be written: ${(error as Error).message}`);
  }
}
