import { expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync } from "node:fs";
import { constants } from "node:os";
import { killGroup } from "./process.ts";
import { until } from "./testing.ts";

// Programs start, and the kernel changes its network, as slowly as the machine is busy.
setDefaultTimeout(60_000);

const { SIGKILL } = constants.signals;
const MODULE = JSON.stringify(`${import.meta.dir}/process.ts`);

const state = (pid: number) => {
  try {
    return /^State:\s+(\S)/m.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1];
  } catch {
    return undefined;
  }
};
const gone = (pid: number) => state(pid) === undefined || state(pid) === "Z";

test("a child that asked for it ends with its parent, however that dies", async () => {
  const inner = `
    import { dieWithParent } from ${MODULE};
    if (!dieWithParent(${SIGKILL}, Number(process.argv.at(-1)))) process.exit(3);
    console.log(process.pid);
    setInterval(() => {}, 1000);`;
  const outer = `
    Bun.spawn([process.execPath, "-e", ${JSON.stringify(inner)}, "--", String(process.pid)], { stdout: "inherit" });
    setInterval(() => {}, 1000);`;
  const parent = Bun.spawn([process.execPath, "-e", outer], { stdout: "pipe" });
  const { value } = await parent.stdout.getReader().read();
  const child = Number(new TextDecoder().decode(value));
  expect(gone(child)).toBe(false);
  parent.kill("SIGKILL");
  await parent.exited;
  await until("the child's end", () => gone(child));
});

test("a parent that is gone already is noticed", async () => {
  const script = `
    import { dieWithParent } from ${MODULE};
    console.log(dieWithParent(${SIGKILL}, 0x7fffffff), dieWithParent(0));`;
  const child = Bun.spawn([process.execPath, "-e", script], { stdout: "pipe" });
  expect(await new Response(child.stdout).text()).toBe("false true\n");
});

test("a process that forbids dumps is not dumpable", async () => {
  const PR_GET_DUMPABLE = 3;
  const script = `
    import { forbidDumps } from ${MODULE};
    import { libc } from ${JSON.stringify(`${import.meta.dir}/libc.ts`)};
    const before = libc.prctl(${PR_GET_DUMPABLE}, 0, 0, 0, 0);
    forbidDumps();
    console.log(before, libc.prctl(${PR_GET_DUMPABLE}, 0, 0, 0, 0));`;
  const child = Bun.spawn([process.execPath, "-e", script], { stdout: "pipe" });
  expect(await new Response(child.stdout).text()).toBe("1 0\n");
});

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
