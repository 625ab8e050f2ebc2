// `bun run bench timing-leak`: does the time of a primitive depend on its secrets? The method of dudect (Reparaz, Balasch,
// Verbauwhede: "Dude, is my code constant time?", 2016): inputs of two classes in random order, one fixed, one random (or
// two extremes), and Welch's t-test on the times of the two, of all samples and without the slowest ones, which are
// interrupts. |t| above 4.5 wants an explanation, above 10 there is a leak. It cannot prove that there is none.
//
// The last row is a comparison that stops at the first difference: it must be found, or the run was too short or noisy.
import { parseFlags, UsageError } from "../src/cli/flags.ts";
import { table } from "../src/cli/output.ts";
import { constantTimeEqual, randomBytes } from "../src/crypto/keys.ts";
import { warmUp } from "../src/crypto/warmup.ts";
import { AEAD_STATE_SIZE, Asm } from "../src/crypto/wasm.ts";
import { progress } from "./lib/report.ts";

const USAGE = "  --samples N   thousands of calls for each primitive (default 200; X25519: a fifth)";
/** Share of the samples, from the fastest, that each test keeps. */
const CROPS = [1, 0.99, 0.9, 0.75, 0.5];
const SUSPICIOUS = 4.5;
const LEAK = 10;
/** Inputs are made beforehand, so many, of `SLOT` bytes each. */
const BLOCK = 512;
const SLOT = 2048;
const WARM_UP_CALLS = 5000;

interface Primitive {
  name: string;
  classes: string;
  /** Of `--samples`. */
  share: number;
  /** The bytes of one input of class 0 or 1. */
  input(of: number): Uint8Array;
  /** Takes the input, not timed. */
  prepare(input: Uint8Array): void;
  run(): unknown;
}

/** Prints the table. Exit status 1: a leak, or the control was not found. */
export async function main(argv: string[]): Promise<number> {
  const flags = parseFlags("bench timing-leak", argv, { samples: "number", help: "boolean" }, USAGE);
  if (flags.help) {
    console.log(USAGE);
    return 0;
  }
  const samples = flags.samples ?? 200;
  if (!(samples >= 1 && samples <= 100_000)) throw new UsageError(`--samples takes 1 to 100000, not ${samples}`);
  const list = primitives();
  const results = list.map((primitive) => {
    progress(`timing-leak: ${primitive.name}, ${primitive.classes}`);
    return measure(primitive, Math.ceil(samples * 1000 * primitive.share));
  });
  const worst = results.map((ts) => ts.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a)));
  const verdicts = worst.map((t) =>
    Math.abs(t) > LEAK ? "LEAK" : Math.abs(t) > SUSPICIOUS ? "suspicious" : "none seen",
  );
  console.log(
    table(
      ["primitive", "classes", ...CROPS.map((crop) => `t, ${crop * 100} %`), "leak"],
      list.map(({ name, classes }, i) => [name, classes, ...results[i]!.map((t) => t.toFixed(2)), verdicts[i]!]),
    ),
  );
  const control = verdicts.pop();
  if (control !== "LEAK") console.error("bench timing-leak: the control was not found: take more --samples");
  return control === "LEAK" && !verdicts.includes("LEAK") ? 0 : 1;
}

/** t for each of CROPS. */
function measure({ input, prepare, run }: Primitive, samples: number): number[] {
  const slots = new Uint8Array(BLOCK * SLOT);
  const classes = new Uint8Array(BLOCK);
  const lengths = new Uint16Array(BLOCK);
  // What is done with a time must not depend on its class before all of the block are taken: it leaves traces in the
  // caches that the next call meets.
  const block = new Float64Array(BLOCK);
  const times: [number[], number[]] = [[], []];
  for (let i = 0; i < Math.min(WARM_UP_CALLS, samples); i++) {
    prepare(input(i & 1));
    run();
  }
  for (let done = 0; done < samples; done += BLOCK) {
    classes.set(randomBytes(BLOCK));
    for (let i = 0; i < BLOCK; i++) {
      classes[i]! &= 1;
      const bytes = input(classes[i]!);
      slots.set(bytes, i * SLOT);
      lengths[i] = bytes.length;
    }
    for (let i = 0; i < BLOCK; i++) {
      prepare(slots.subarray(i * SLOT, i * SLOT + lengths[i]!));
      const start = Bun.nanoseconds();
      run();
      block[i] = Bun.nanoseconds() - start;
    }
    for (let i = 0; i < BLOCK; i++) times[classes[i]! as 0 | 1].push(block[i]!);
  }
  const sorted = [...times[0], ...times[1]].sort((a, b) => a - b);
  return CROPS.map((crop) => {
    const limit = sorted[Math.ceil(sorted.length * crop) - 1]!;
    return welch(...(times.map((list) => list.filter((time) => time <= limit)) as [number[], number[]]));
  });
}

/** Welch's t of two samples; 0 when neither varies. */
function welch(a: readonly number[], b: readonly number[]): number {
  const stats = [a, b].map((list) => {
    const mean = list.reduce((sum, x) => sum + x, 0) / list.length;
    const variance = list.reduce((sum, x) => sum + (x - mean) ** 2, 0) / (list.length - 1);
    return { mean, error: variance / list.length };
  });
  const error = Math.sqrt(stats[0]!.error + stats[1]!.error);
  return error > 0 ? (stats[0]!.mean - stats[1]!.mean) / error : 0;
}

function primitives(): Primitive[] {
  const asm = Asm.create(64);
  warmUp(asm);
  const x = asm.exports;
  const [state, key, point, out, packet] = [AEAD_STATE_SIZE, 64, 64, 64, SLOT].map((n) => asm.alloc(n)) as [
    number,
    number,
    number,
    number,
    number,
  ];
  const put = (bytes: Uint8Array, at: number) => asm.u8.set(bytes, at);
  const fixed = (bytes: number) => new Uint8Array(bytes).fill(0x5a);
  const fixedOrRandom = (bytes: number) => {
    const one = fixed(bytes);
    return (of: number) => (of === 0 ? one : randomBytes(bytes));
  };

  const seal = (size: number): Primitive => ({
    name: `AEAD seal ${size} B`,
    classes: "key and plaintext fixed, random",
    share: 1,
    input: fixedOrRandom(32 + size),
    prepare(input) {
      put(input.subarray(0, 32), key);
      put(input.subarray(32), packet);
      x.aeadInit(state, key);
    },
    run: () => x.aeadSeal(packet, size, state, 1, 0),
  });

  const forged = (size: number): Primitive => {
    put(fixed(32), key);
    x.aeadInit(state, key);
    put(fixed(size), packet);
    x.aeadSeal(packet, size, state, 1, 0);
    const right = asm.u8.slice(packet, packet + size + 16);
    const wrong = [0, 15].map((at) => {
      const bytes = right.slice();
      bytes[size + at]! ^= 1;
      return bytes;
    });
    return {
      name: `AEAD open ${size} B`,
      classes: "tag wrong in its first, last byte",
      share: 1,
      input: (of) => wrong[of]!,
      prepare(input) {
        // The key of the others may have been set since.
        put(fixed(32), key);
        x.aeadInit(state, key);
        put(input, packet);
      },
      run: () => x.aeadOpen(packet, size, state, 1, 0),
    };
  };

  const x25519: Primitive = {
    name: "X25519",
    classes: "scalar fixed, random",
    share: 0.2,
    input: fixedOrRandom(32),
    prepare(input) {
      put(input, key);
      put(fixed(32), point);
    },
    run: () => x.x25519(out, key, point),
  };

  const hmac: Primitive = {
    name: "HMAC-BLAKE2s 64 B",
    classes: "key and message fixed, random",
    share: 1,
    input: fixedOrRandom(96),
    prepare(input) {
      put(input.subarray(0, 32), key);
      put(input.subarray(32), packet);
    },
    run: () => x.hmacBlake2s(out, key, 32, packet, 64),
  };

  const box: Primitive = {
    name: "NaCl box seal 100 B",
    classes: "key and plaintext fixed, random",
    share: 1,
    input: fixedOrRandom(132),
    prepare(input) {
      put(input.subarray(0, 32), key);
      put(input.subarray(32), packet + 16);
      put(fixed(24), point);
    },
    run: () => x.boxSeal(packet, 100, key, point),
  };

  // 1024 bytes: then a difference is longer than the clock is coarse.
  const compare = (name: string, equal: (a: Uint8Array, b: Uint8Array) => boolean): Primitive => {
    const one = fixed(1024);
    let other: Uint8Array = fixed(1024);
    const wrong = [0, 1023].map((at) => {
      const bytes = one.slice();
      bytes[at]! ^= 1;
      return bytes;
    });
    return {
      name,
      classes: "difference in the first, last byte",
      share: 1,
      input: (of) => wrong[of]!,
      prepare(input) {
        other = input;
      },
      run: () => equal(one, other),
    };
  };

  return [
    seal(64),
    seal(1420),
    forged(64),
    forged(1420),
    x25519,
    hmac,
    box,
    compare("constantTimeEqual", constantTimeEqual),
    compare("control: stops early", (a, b) => a.every((byte, i) => byte === b[i])),
  ];
}
