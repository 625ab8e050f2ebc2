// CPU time as the kernel accounts it.
import { readdirSync, readFileSync } from "node:fs";

/** Seconds that all threads of these processes have run, from each thread's schedstat (nanoseconds), else from stat (10 ms). */
export function cpuSeconds(pids: readonly number[]): number {
  return pids.reduce((sum, pid) => sum + processSeconds(pid), 0);
}

function processSeconds(pid: number): number {
  try {
    return threadNanoseconds(pid) / 1e9;
  } catch {
    // utime and stime are the fields 14 and 15; the second, the name, may hold spaces.
    const fields = readFileSync(`/proc/${pid}/stat`, "utf8").split(") ")[1]!.split(" ");
    return (Number(fields[11]) + Number(fields[12])) / 100;
  }
}

function threadNanoseconds(pid: number): number {
  let sum = 0;
  for (const thread of readdirSync(`/proc/${pid}/task`))
    sum += Number(readFileSync(`/proc/${pid}/task/${thread}/schedstat`, "utf8").split(" ")[0]);
  return sum;
}

/** Seconds that all cores together were busy with anything, interrupts included. */
export function machineSeconds(): number {
  const [user = 0, nice = 0, system = 0, , , irq = 0, softirq = 0] = readFileSync("/proc/stat", "utf8")
    .split("\n")[0]!
    .split(/\s+/)
    .slice(1)
    .map(Number);
  return (user + nice + system + irq + softirq) / 100;
}
