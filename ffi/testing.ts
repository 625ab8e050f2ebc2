// For the tests of this folder: a network namespace that lasts as long as the test.
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
export async function until<T>(what: string, condition: () => T, deadlineMs = 5000): Promise<NonNullable<T>> {
  const end = performance.now() + deadlineMs;
  for (;;) {
    const value = condition();
    if (value) return value as NonNullable<T>;
    if (performance.now() > end) throw new Error(`${what}: not within ${deadlineMs} ms`);
    await Bun.sleep(2);
  }
}
