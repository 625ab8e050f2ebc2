// The pages that describe the APIs, in a real browser: they show every operation, and load and run nothing from elsewhere.
import { expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { chromium } from "playwright-core";
import { TestServer } from "../src/control/testing.ts";
import { skip } from "./lib/mesh.ts";

const CHROMIUM = "/usr/bin/chromium";
const noBrowser = existsSync(CHROMIUM) ? null : `${CHROMIUM} is absent (apt package chromium)`;

test.skipIf(skip(noBrowser))(
  "Chromium shows both APIs by their documentation pages, from this server alone",
  async () => {
    await using server = await TestServer.start();
    const browser = await chromium.launch({
      executablePath: CHROMIUM,
      args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
    });
    try {
      for (const base of ["/api/v1", "/api/v2"]) {
        const page = await browser.newPage();
        const asked: string[] = [];
        const problems: string[] = [];
        page.on("request", (request) => asked.push(request.url()));
        page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
        page.on("pageerror", (error) => problems.push(String(error)));
        await page.goto(`${server.url}${base}/docs`);
        const document = (await (await fetch(`${server.url}${base}/openapi.json`)).json()) as {
          paths: Record<string, object>;
        };
        const operations = Object.values(document.paths).flatMap((path) => Object.keys(path)).length;
        await page
          .locator(".opblock")
          .nth(operations - 1)
          .waitFor({ timeout: 20_000 });
        expect(await page.locator(".opblock").count()).toBe(operations);
        const foreign = asked.filter((url) => !url.startsWith(`${server.url}/`) && !url.startsWith("data:"));
        expect({ foreign, problems }).toEqual({
          foreign: [],
          problems: [],
        });
        await page.close();
      }
    } finally {
      await browser.close();
    }
  },
  60_000,
);
