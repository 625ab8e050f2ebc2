// Whole programs take turns, as functions do in micro.ts.
import { progress, type Report } from "./report.ts";

/** Round by round, and in each round program by program, beginning with another one. */
export async function inTurns<T extends { impl: string }>(
  contestants: readonly T[],
  rounds: number,
  name: string,
  report: Report,
  one: (contestant: T, round: number) => Promise<void>,
): Promise<void> {
  for (let round = 0; round < rounds; round++) {
    for (let i = 0; i < contestants.length; i++) {
      const contestant = contestants[(i + round) % contestants.length]!;
      progress(`${report.part}: ${name}: round ${round + 1} of ${rounds}: ${contestant.impl}`);
      await attempt(report, contestant.impl, () => one(contestant, round));
    }
  }
}

/** What goes wrong with a rival is noted, and the others go on; what goes wrong with Weft ends the run. */
export async function attempt(report: Report, impl: string, action: () => Promise<void>): Promise<void> {
  try {
    await action();
  } catch (error) {
    if (impl.startsWith("weft")) throw error;
    report.note(`${impl} is left out of a round: ${error instanceof Error ? error.message : error}`);
  }
}
