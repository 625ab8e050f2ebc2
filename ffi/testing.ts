// For the tests of this folder and of those that use it: a network namespace that lasts as long as the test.

import { readFileSync } from "node:fs";
import { closeFd } from "./libc.ts";
import { Netlink } from "./netlink.ts";
import { createNetns, withNetns } from "./netns.ts";

function whyNot(): string | null {
  try {
    closeFd(createNetns());
    return null;
  } catch (error) {
    return error instanceof Error ? error.message : String(error);
  }
}

const reason = whyNot();

/** For `test.skipIf`: this process may not make network namespaces. Said once on standard error. */
export const noNetns = reason !== null;
if (noNetns) process.stderr.write(`SKIP: tests in network namespaces need root or \`unshare -Urnm\`: ${reason}\n`);

// Root of a user namespace has nobody to become.
const canGiveUpRights =
  !noNetns && process.getuid?.() === 0 && /^\s*0\s+0\s+4294967295\s*$/.test(readFileSync("/proc/self/uid_map", "utf8"));

/** For `test.skipIf`: this process cannot start a child without rights. */
export const noUnprivileged = !canGiveUpRights;
if (noUnprivileged) process.stderr.write("SKIP: what happens without rights: needs real root, to give it up\n");

/** Runs `code`, an async function's body, as nobody in the namespace; what it printed. Modules are loaded before. */
export async function asNobody(netns: TestNetns, modules: Record<string, string>, code: string): Promise<string> {
  const imports = Object.entries(modules).map(([names, file]) => `import { ${names} } from ${JSON.stringify(file)};\n`);
  const script = `${imports.join("")}process.setgroups([]); process.setgid(65534); process.setuid(65534);\n${code}`;
  const child = netns.run(() => Bun.spawn([process.execPath, "-e", script], { stdout: "pipe", stderr: "inherit" }));
  return await new Response(child.stdout).text();
}

/** A fresh namespace with loopback up. Its interfaces disappear with it. */
export class TestNetns implements Disposable {
  readonly fd = createNetns();
  readonly netlink = this.run(() => new Netlink());

  constructor() {
    this.netlink.setLink("lo", { up: true });
  }

  /** Runs a synchronous `action` inside. */
  run<T>(action: () => T extends Promise<unknown> ? never : T): T {
    return withNetns(this.fd, action);
  }

  [Symbol.dispose](): void {
    this.netlink.close();
    closeFd(this.fd);
  }
}

/** Resolves when `condition` gives something truthy; throws after `deadlineMs`. */
export async function until<T>(what: string, condition: () => T, deadlineMs = 60_000): Promise<NonNullable<T>> {
  const end = performance.now() + deadlineMs;
  for (;;) {
    const value = condition();
    if (value) return value as NonNullable<T>;
    if (performance.now() > end) throw new Error(`${what}: not within ${deadlineMs} ms`);
    await Bun.sleep(2);
  }
}
