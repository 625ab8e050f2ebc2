// `bun test/lib/browse.ts URL ACCOUNT`: signs in at the identity provider behind a login address as a person would, by its
// forms, lets the machine in, and prints what the last page says.
import { Browser } from "../../src/control/pages/testing.ts";

const [url = "", account = ""] = process.argv.slice(2);
const browser = new Browser();
const done = await browser.submit(await browser.signIn(url, account), { answer: "yes" });
console.log(
  done.status,
  /<main>([\s\S]*)<\/main>/
    .exec(done.text)?.[1]
    ?.replace(/<[^>]*>/g, " ")
    .trim(),
);
