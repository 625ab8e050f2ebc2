// A program that runs on a host until it is stopped, with the end of what it said.
import type { Host } from "./network.ts";

const KEEP = 64 * 1024;

export class Daemon {
  readonly pid: number;
  readonly exited: Promise<number>;
  /** When `output` has all that it will ever say. */
  readonly silent: Promise<unknown>;
  readonly #child: Bun.Subprocess<"ignore", "pipe", "pipe">;
  readonly #keep: number;
  #output = "";

  /** `env` is added to this process's environment; the last `keep` characters of what it says are kept. */
  constructor(host: Host, command: string[], env: Record<string, string | undefined> = {}, keep = KEEP) {
    this.#keep = keep;
    this.#child = host.exec(command, { env: { ...process.env, ...env } });
    this.pid = this.#child.pid;
    this.exited = this.#child.exited;
    this.silent = Promise.all([this.#child.stdout, this.#child.stderr].map((stream) => this.#gather(stream)));
  }

  /** Null while it runs; 128 + signal when one ended it. */
  get exitCode(): number | null {
    return this.#child.exitCode ?? (this.#child.signalCode ? 128 : null);
  }

  kill(signal: NodeJS.Signals = "SIGTERM"): void {
    this.#child.kill(signal);
  }

  /** The end of standard output and error as they came. */
  output(): string {
    return this.#output;
  }

  /** The last line that is not empty: where a program that gave up says why. */
  lastLine(): string {
    return this.#output.trimEnd().split("\n").at(-1) ?? "";
  }

  async #gather(stream: ReadableStream<Uint8Array>): Promise<void> {
    const decoder = new TextDecoder();
    for await (const chunk of stream)
      this.#output = (this.#output + decoder.decode(chunk, { stream: true })).slice(-this.#keep);
  }
}
