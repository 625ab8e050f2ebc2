// What is wrong with a policy, and where. `message` is the sentence alone (the hosted service's own words where they are
// known), `place` the line and column that an editor shows, both from 1.

export interface Place {
  line: number;
  column: number;
}

/** One failed entry of `tests` or `sshTests`. */
export interface TestFailure {
  /** The entry's `src`. */
  user: string;
  errors: string[];
}

export class PolicyError extends Error {
  override readonly name = "PolicyError";

  constructor(
    message: string,
    readonly place: Place | null = null,
    readonly failures: readonly TestFailure[] = [],
  ) {
    super(message);
  }

  /** With place and failed tests, for people. */
  describe(): string {
    const where = this.place ? `line ${this.place.line}, column ${this.place.column}: ` : "";
    const lines = this.failures.flatMap(({ user, errors }) => errors.map((error) => `  ${user || '""'}: ${error}`));
    return [`${where}${this.message}`, ...lines].join("\n");
  }
}
