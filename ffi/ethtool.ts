// What a network device does by itself (`ethtool -k`, `ethtool -K`): SIOCETHTOOL.
//
//   struct ifreq 40 bytes: name[16] 0, pointer to a command 16
//   GSSET_INFO: cmd u32 0, reserved u32 4, mask u64 8, then one u32 for each set of the mask: how many strings
//   GSTRINGS:   cmd u32 0, set u32 4, count u32 8, then 32 bytes for each name
//   GFEATURES:  cmd u32 0, blocks u32 4, then for each 32 features: available, requested, active, never changed u32
//   SFEATURES:  cmd u32 0, blocks u32 4, then for each 32 features: valid, requested u32
import { AF_INET, SOCK_CLOEXEC, SOCK_DGRAM } from "./constants.ts";
import { EINVAL } from "./errno.ts";
import { addressOf, buffer, check, closeFd, libc, SysError } from "./libc.ts";

const SIOCETHTOOL = 0x8946;
const ETHTOOL_GSTRINGS = 0x1b;
const ETHTOOL_GSSET_INFO = 0x37;
const ETHTOOL_GFEATURES = 0x3a;
const ETHTOOL_SFEATURES = 0x3b;
const ETH_SS_FEATURES = 4;
const NAME_SIZE = 32;

/** The features of a device of this thread's network namespace by their names in the kernel, and whether they are on. */
export function linkFeatures(link: string): Record<string, boolean> {
  return onLink(link, (call) => {
    const names = featureNames(call);
    const blocks = Math.ceil(names.length / 32);
    const view = command(8 + 16 * blocks, ETHTOOL_GFEATURES, blocks);
    call(view);
    const active = (i: number) => ((view.getUint32(8 + 16 * (i >> 5) + 8, true) >>> (i & 31)) & 1) === 1;
    return Object.fromEntries(names.map((name, i) => [name, active(i)]));
  });
}

/** Turns features on or off. Throws SysError; one that the device cannot change stays as it is without an error. */
export function setLinkFeatures(link: string, changes: Record<string, boolean>): void {
  onLink(link, (call) => {
    const names = featureNames(call);
    const blocks = Math.ceil(names.length / 32);
    const view = command(8 + 8 * blocks, ETHTOOL_SFEATURES, blocks);
    for (const [name, on] of Object.entries(changes)) {
      const i = names.indexOf(name);
      if (i < 0) throw new SysError(EINVAL, `change ${name} of ${link}`, "this kernel has no feature of that name");
      const at = 8 + 8 * (i >> 5);
      const bit = 1 << (i & 31);
      view.setUint32(at, view.getUint32(at, true) | bit, true);
      if (on) view.setUint32(at + 4, view.getUint32(at + 4, true) | bit, true);
    }
    call(view);
  });
}

type Call = (request: DataView<ArrayBuffer>) => void;

function onLink<T>(link: string, action: (call: Call) => T): T {
  const socket = check(libc.socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), "open a socket to ask about a device");
  try {
    const ifreq = buffer(40);
    ifreq.set(new TextEncoder().encode(link).subarray(0, 15));
    return action((request) => {
      new DataView(ifreq.buffer).setBigUint64(16, BigInt(addressOf(request.buffer)), true);
      check(libc.ioctl(socket, SIOCETHTOOL, ifreq), `read or change the features of ${link}`);
    });
  } finally {
    closeFd(socket);
  }
}

function featureNames(call: Call): string[] {
  const info = command(20, ETHTOOL_GSSET_INFO, 0);
  info.setBigUint64(8, 1n << BigInt(ETH_SS_FEATURES), true);
  call(info);
  const count = info.getUint32(16, true);
  const strings = command(12 + NAME_SIZE * count, ETHTOOL_GSTRINGS, ETH_SS_FEATURES);
  strings.setUint32(8, count, true);
  call(strings);
  const bytes = new Uint8Array(strings.buffer, 12);
  return Array.from({ length: count }, (_, i) => {
    const name = bytes.subarray(i * NAME_SIZE, (i + 1) * NAME_SIZE);
    const end = name.indexOf(0);
    return new TextDecoder().decode(end < 0 ? name : name.subarray(0, end));
  });
}

function command(size: number, number: number, second: number): DataView<ArrayBuffer> {
  const view = new DataView(buffer(size).buffer);
  view.setUint32(0, number, true);
  view.setUint32(4, second, true);
  return view;
}
