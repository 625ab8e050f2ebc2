import { expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync } from "node:fs";
import { constants } from "node:os";
import { killGroup } from "./process.ts";
import { until } from "./testing.ts";

// Programs start, and the kernel changes its network, as slowly as the machine is busy.
setDefaultTimeout(120_000);

const { SIGKILL } = constants.signals;
const state = (pid: number) => {
  try {
    return /^State:\s+(\S)/m.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1];
  } catch {
    return undefined;
  }
};
const gone = (pid: number) => state(pid) === undefined || state(pid) === "Z";

test("a group is killed as a whole", async () => {
  const leader = Bun.spawn(["sh", "-c", "sleep 60 & echo $!; wait"], { detached: true, stdout: "pipe" });
  const { value } = await leader.stdout.getReader().read();
  const member = Number(new TextDecoder().decode(value));
  expect(gone(member)).toBe(false);
  expect(killGroup(leader.pid, SIGKILL)).toBe(true);
  await leader.exited;
  await until("the member's end", () => gone(member));
  expect(killGroup(0x7fff_fffe, 0)).toBe(false);
});
