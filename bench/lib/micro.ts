// Micro-benchmarks: functions that do the same work take turns under mitata, so that what disturbs the machine for a while
// disturbs all of them.
import { measure } from "mitata";
import type { BenchOptions } from "./options.ts";

const TURNS = 8;
const TURN_NS = 50e6;
const QUICK_NS = 2e6;
const WARM_MS = 50;

/** Nanoseconds per call, the samples of all turns, by name. A function that returns a promise is not for this. */
export async function race<Name extends string>(
  contestants: Readonly<Record<Name, () => unknown>>,
  { quick, rounds }: Pick<BenchOptions, "quick" | "rounds">,
): Promise<Record<Name, number[]>> {
  const names = Object.keys(contestants) as Name[];
  const out = Object.fromEntries(names.map((name) => [name, []])) as unknown as Record<Name, number[]>;
  // Warm: the compiler is not what is measured.
  for (const name of names)
    for (const end = performance.now() + (quick ? WARM_MS / 10 : WARM_MS); performance.now() < end; )
      contestants[name]();
  const turns = rounds ?? (quick ? 1 : TURNS);
  for (let turn = 0; turn < turns; turn++) {
    // Who begins changes: the first after a pause may run at another clock.
    for (let i = 0; i < names.length; i++) {
      const name = names[(i + turn) % names.length]!;
      const { samples } = await measure(contestants[name], {
        min_cpu_time: quick ? QUICK_NS : TURN_NS,
        min_samples: quick ? 3 : 12,
        batch_samples: 256,
      });
      for (const sample of samples) out[name].push(sample);
    }
  }
  return out;
}
