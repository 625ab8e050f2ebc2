// `bun run bench [PART]`: what the README claims about speed, each part a command that prints its table.
const parts: Record<string, { what: string; load: () => Promise<{ main(argv: string[]): Promise<number> }> }> = {
  crypto: {
    what: "AEAD, X25519, BLAKE2s and NaCl box beside @noble and node:crypto",
    load: () => import("./crypto.ts"),
  },
  soak: {
    what: "WireGuard tunnels for real minutes across real rekeys, with every implementation installed",
    load: () => import("./soak.ts"),
  },
};

export async function main(argv: string[]): Promise<number> {
  const [part, ...rest] = argv;
  if (!part || part === "--help") {
    console.log("usage: bun run bench PART\nparts:");
    for (const [name, { what }] of Object.entries(parts)) console.log(`  ${name.padEnd(10)}${what}`);
    return 0;
  }
  const found = Object.hasOwn(parts, part) ? parts[part] : undefined;
  if (!found) {
    console.error(`weft bench: there is no part ${JSON.stringify(part)}; known are: ${Object.keys(parts).join(", ")}.`);
    return 2;
  }
  return (await found.load()).main(rest);
}
