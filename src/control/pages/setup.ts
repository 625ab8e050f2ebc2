// Pages that help to point official clients at this server: Windows, Android, Apple's systems (with a configuration profile
// to install), and what this address is at all.
import { createHash } from "node:crypto";
import { type Context, Hono } from "hono";
import { html } from "hono/html";
import { securityHeaders } from "../../net/guards.ts";
import { page, secured } from "./layout.ts";

/** Which settings a variant of the client reads. */
const APPLE = {
  ios: { type: "io.tailscale.ipn.ios", name: "iOS, iPadOS, tvOS" },
  "macos-app-store": { type: "io.tailscale.ipn.macos", name: "macOS, from the App Store" },
  "macos-standalone": { type: "io.tailscale.ipn.macsys", name: "macOS, downloaded" },
} as const;

export function setupPages(serverUrl: string): Hono {
  const app = new Hono();
  const login = `tailscale login --login-server ${serverUrl}`;
  const routes: [string, (c: Context) => Response | Promise<Response>][] = [
    [
      "/",
      (c) =>
        page(
          c,
          200,
          "A private network",
          html`<p>This is the control server of a private network. To set up a machine with Tailscale's client:</p>
<pre><code>${login}</code></pre>
<p><a class="button" href="/windows">Windows</a><a class="button" href="/apple">Apple</a><a class="button" href="/android">Android</a></p>`,
        ),
    ],
    [
      "/windows",
      (c) =>
        page(
          c,
          200,
          "Windows",
          html`<p>Install Tailscale, then run this in PowerShell or the command prompt:</p>
<pre><code>${login}</code></pre>
<p>To make it the default of every user of the machine, run this in PowerShell as an administrator before the first login:</p>
<pre><code>New-Item -Path "HKLM:\\SOFTWARE\\Tailscale IPN" -Force
New-ItemProperty -Path "HKLM:\\SOFTWARE\\Tailscale IPN" -Name LoginURL -PropertyType String -Value ${serverUrl} -Force</code></pre>`,
        ),
    ],
    [
      "/android",
      (c) =>
        page(
          c,
          200,
          "Android",
          html`<p>Install Tailscale. In the app, before the first login, open the settings, then <em>Accounts</em>, and choose
<em>Use an alternate server</em> in the menu with three dots. The address to enter:</p>
<pre><code>${serverUrl}</code></pre>
<p>The login opens by itself. With a pre-auth key, close it and choose <em>Use an auth key</em> in the same menu.</p>`,
        ),
    ],
    [
      "/apple",
      (c) =>
        page(
          c,
          200,
          "Apple",
          html`<p>On macOS, in a terminal:</p>
<pre><code>${login}</code></pre>
<p>Or install a configuration profile, which makes this server the default of the app. Open it on the device, then confirm it in the system's settings:</p>
<p>${Object.entries(APPLE).map(([name, variant]) => html`<a class="button" href="/apple/${name}">${variant.name}</a>`)}</p>
<p>On an iPhone or iPad by hand: in the app, the account in the upper corner, then <em>Log in…</em>, and in the menu there
<em>Use custom coordination server</em>. The address to enter:</p>
<pre><code>${serverUrl}</code></pre>`,
        ),
    ],
  ];
  for (const [path, handler] of routes) app.get(path, securityHeaders, secured, handler);
  for (const [name, { type }] of Object.entries(APPLE))
    app.get(`/apple/${name}`, (c) =>
      c.body(profile(type, serverUrl), 200, {
        "Content-Type": "application/x-apple-aspen-config; charset=utf-8",
        "Content-Disposition": `attachment; filename="weft-${name}.mobileconfig"`,
      }),
    );
  return app;
}

/** A configuration profile of one payload. The same server gives the same ids, so that a second one replaces the first. */
function profile(type: string, serverUrl: string): string {
  const url = serverUrl.replace(/&/g, "&amp;").replace(/</g, "&lt;");
  const payload = (kind: string, id: string, content: string) => `<dict>
<key>PayloadType</key><string>${kind}</string>
<key>PayloadIdentifier</key><string>${id}</string>
<key>PayloadUUID</key><string>${uuidOf(`${id} ${serverUrl}`)}</string>
<key>PayloadVersion</key><integer>1</integer>
<key>PayloadDisplayName</key><string>Weft at ${url}</string>
${content}
</dict>`;
  const settings = payload(type, `weft.${type}`, `<key>ControlURL</key><string>${url}</string>`);
  const whole = payload("Configuration", "weft", `<key>PayloadContent</key><array>\n${settings}\n</array>`);
  return `<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0">
${whole}
</plist>
`;
}

/** A name-based UUID (version 8: of our own making). */
function uuidOf(name: string): string {
  const digits = createHash("sha256").update(name).digest("hex");
  const parts = [digits.slice(0, 8), digits.slice(8, 12), `8${digits.slice(13, 16)}`, `8${digits.slice(17, 20)}`];
  return [...parts, digits.slice(20, 32)].join("-").toUpperCase();
}
