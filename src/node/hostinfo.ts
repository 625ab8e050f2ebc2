// What this node tells its control server about itself (spec/ts2021-control-protocol.md, section 15).
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { arch, hostname, release } from "node:os";
import type { Hostinfo } from "../wire/tailcfg.ts";
import type { Prefs } from "./state.ts";

/** Go's word for the processor. */
const GO_ARCH: Record<string, string> = { x64: "amd64", arm64: "arm64" };
const MACHINE: Record<string, string> = { x64: "x86_64", arm64: "aarch64" };

/** @param machinePublic gives the log id its stable value; logs are never uploaded */
export function hostinfo(prefs: Readonly<Prefs>, version: string, machinePublic: Uint8Array): Hostinfo {
  const distro = osRelease();
  return {
    IPNVersion: version,
    BackendLogID: createHash("sha256").update("weft log id").update(machinePublic).digest("hex"),
    OS: "linux",
    OSVersion: release(),
    ...(distro.ID ? { Distro: distro.ID } : {}),
    ...(distro.VERSION_ID ? { DistroVersion: distro.VERSION_ID } : {}),
    ...(distro.VERSION_CODENAME ? { DistroCodeName: distro.VERSION_CODENAME } : {}),
    App: "weft",
    Hostname: prefs.Hostname || hostname(),
    Machine: MACHINE[arch()] ?? arch(),
    GoArch: GO_ARCH[arch()] ?? arch(),
    NoLogsNoSupport: true,
    ...(prefs.ShieldsUp ? { ShieldsUp: true } : {}),
    ...(prefs.AdvertiseTags?.length ? { RequestTags: prefs.AdvertiseTags } : {}),
  };
}

function osRelease(): Record<string, string> {
  const fields: Record<string, string> = {};
  try {
    for (const line of readFileSync("/etc/os-release", "utf8").split("\n")) {
      const match = /^([A-Z_]+)="?([^"]*)"?$/.exec(line);
      if (match) fields[match[1]!] = match[2]!;
    }
  } catch {
    // Not every system has the file.
  }
  return fields;
}
