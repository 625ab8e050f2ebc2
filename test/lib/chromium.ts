// `bun test/lib/chromium.ts URL ACCOUNT [TABS]`: a person with a browser. Opens a login address in Chromium (in as many tabs), signs
// in at the identity provider behind it, lets the machine in, and prints as JSON what was seen on the way.
import { chromium, type Page } from "playwright-core";

export interface Visit {
  /** What the page that asks says, and what the last page of the first tab says. */
  question: string;
  answer: string;
  /** On pages of the login address's server: refused by the content security policy, failed, or thrown by a script. */
  problems: string[];
  /** What those pages loaded beside themselves. */
  loaded: string[];
  /** Cookies that those pages set, and what the provider sent back with the visitor, by name. */
  secrets: [name: string, value: string][];
}

const [url = "", account = "", tabs = "1"] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath: "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
});
try {
  const context = await browser.newContext({ ignoreHTTPSErrors: true });
  const isOurs = (address: string) => address.startsWith(new URL(url).origin);
  const problems: string[] = [];
  const loaded: string[] = [];
  const secrets: Visit["secrets"] = [];
  // There is no way out of the lab: the provider's page must not wait for its fonts.
  await context.route(
    (address) => /[a-z]$/.test(address.hostname),
    (route) => route.abort(),
  );
  context.on("request", (request) => {
    if (!request.isNavigationRequest() && isOurs(request.frame().url())) loaded.push(request.url());
  });
  const headers: Promise<void>[] = [];
  context.on("response", (response) => {
    if (!isOurs(response.url())) return;
    const { searchParams } = new URL(response.url());
    for (const name of ["code", "state"]) if (searchParams.has(name)) secrets.push([name, searchParams.get(name)!]);
    const keep = (cookies: string[]) => {
      for (const cookie of cookies) secrets.push(/^([^=]*)=([^;]*)/.exec(cookie)!.slice(1) as [string, string]);
    };
    headers.push(response.headerValues("set-cookie").then(keep));
  });
  context.on("console", (message) => {
    if (message.type() === "error" && isOurs(message.page()?.url() ?? "")) problems.push(message.text());
  });
  context.on("weberror", (error) => problems.push(String(error.error())));

  /** To the page that asks whether to let the machine in. */
  const signIn = async (page: Page): Promise<string> => {
    await page.goto(url);
    for (let steps = 0; steps < 3 && (await page.locator("input[name=prompt]").count()) > 0; steps++) {
      if ((await page.locator("input[name=login]").count()) > 0) {
        await page.fill("input[name=login]", account);
        await page.fill("input[name=password]", "any will do");
      }
      await Promise.all([page.waitForNavigation(), page.click("button[type=submit]")]);
    }
    if ((await page.locator("button[value=yes]").count()) === 0)
      throw new Error(`${page.url()} does not ask: ${await page.content()}`);
    return (await page.locator("main").textContent()) ?? "";
  };

  const pages = await Promise.all(Array.from({ length: Number(tabs) }, () => context.newPage()));
  let question = "";
  // Signed in one by one, so that the last tab's cookies come over those of the first.
  for (const page of pages) question = await signIn(page);
  const first = pages[0]!;
  await Promise.all([first.waitForNavigation(), first.click("button[value=yes]")]);
  const answer = (await first.locator("main").textContent()) ?? "";
  await Promise.all(headers);
  console.log(JSON.stringify({ question, answer, problems, loaded, secrets } satisfies Visit));
} finally {
  await browser.close();
}
