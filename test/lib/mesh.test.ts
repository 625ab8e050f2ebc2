import { expect, setDefaultTimeout, test } from "bun:test";
import { Lab } from "../../lab/network.ts";
import { Box, cannotUseNamespaces, Hopeless, skip, tempDir, until } from "./mesh.ts";

setDefaultTimeout(300_000);

test("what cannot come any more is not waited for, what failed only now is", async () => {
  let looks = 0;
  const check = () => {
    looks++;
    throw looks === 3 ? new Hopeless("it has ended") : new Error("not yet");
  };
  await expect(until("it is there", check, 60, 1)).rejects.toThrow(/^it has ended$/);
  expect(looks).toBe(3);
});

test.skipIf(skip(cannotUseNamespaces))("a box that ends instead of starting says why, at once", async () => {
  using dir = tempDir("box");
  await using lab = await Lab.create("dead");
  const start = Box.start(await lab.host("box"), dir.path, { args: ["--listen", "nowhere"] });
  await expect(start).rejects.toThrow(/^weft box ended with 2: .*nowhere/s);
});
