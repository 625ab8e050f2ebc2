// ChaCha20-Poly1305 by `openssl speed`, as the machine can, and held to 128-bit vectors, which is what WebAssembly has.
import { programVersion } from "./machine.ts";

/** Name of the program in the table, and what makes it so. */
export const OPENSSL: Record<string, Record<string, string>> = {
  openssl: {},
  ...(process.arch === "x64" && { "openssl, 128-bit": { OPENSSL_ia32cap: ":0" } }),
};

/** Null: not installed. */
export function opensslVersion(): string | null {
  return programVersion(["openssl", "version"]);
}

/** Nanoseconds per message of `bytes` bytes, one second of its CPU time. Its stream has one key and nonce for all. */
export async function opensslAead(program: string, bytes: number, decrypt: boolean): Promise<number> {
  const command = ["openssl", "speed", "-mr", "-evp", "chacha20-poly1305", "-bytes", `${bytes}`, "-seconds", "1"];
  if (decrypt) command.push("-decrypt");
  const child = Bun.spawn(command, {
    env: { ...process.env, ...OPENSSL[program] },
    stdin: "ignore",
    stdout: "pipe",
    stderr: "ignore",
  });
  const [out, status] = await Promise.all([new Response(child.stdout).text(), child.exited]);
  const rate = Number(/^\+F:\d+:[^:]+:([\d.]+)/m.exec(out)?.[1]);
  if (status !== 0 || !(rate > 0)) throw new Error(`bench: ${command.join(" ")} gave no rate (exit status ${status})`);
  return (bytes / rate) * 1e9;
}
