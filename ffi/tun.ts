// TUN devices with virtio_net_hdr: the kernel hands over and takes TCP and UDP super-packets of up to 64 KB.
//
//   struct ifreq 40 bytes: name[16] 0, flags u16 16
//   struct virtio_net_hdr 10 bytes, native endian, before every packet: flags u8 0 (NEEDS_CSUM 1), gso_type u8 1
//     (NONE 0, TCPV4 1, TCPV6 4, UDP_L4 5, or'ed with ECN 0x80), hdr_len u16 2, gso_size u16 4, csum_start u16 6,
//     csum_offset u16 8
//
// A device lives as long as its descriptor: closing it (or dying) removes it. Facts of the kernel that callers meet:
// link down: write EIO, read EAGAIN. Device deleted by somebody: EBADFD on both, and epoll reports EPOLLERR for ever. A read
// buffer that is too short truncates silently: TUN_READ_SIZE is always enough.
import { AF_INET, O_CLOEXEC, O_NONBLOCK, O_RDWR, SOCK_CLOEXEC, SOCK_DGRAM } from "./constants.ts";
import { EACCES, EBUSY, EINVAL, ENODEV, ENOENT, ENXIO, EPERM } from "./errno.ts";
import { type Address, buffer, check, closeFd, cstring, errno, type Libc, libc, orErrno, SysError } from "./libc.ts";

export const VNET_HEADER_SIZE = 10;
export const VIRTIO_NET_HDR_F_NEEDS_CSUM = 1;
export const VIRTIO_NET_HDR_GSO_TCPV4 = 1;

/** Room for the largest read: vnet header and a GSO packet of 65536 bytes, with a little to spare. */
export const TUN_READ_SIZE = 65556;

export const TUNSETIFF = 0x400454ca;
export const TUNSETOFFLOAD = 0x400454d0;
export const TUNSETVNETHDRSZ = 0x400454d8;
export const SIOCGIFINDEX = 0x8933;

export const IFF_TUN = 1;
export const IFF_NO_PI = 0x1000;
export const IFF_VNET_HDR = 0x4000;

export const TUN_F_CSUM = 1;
export const TUN_F_TSO4 = 2;
export const TUN_F_TSO6 = 4;
export const TUN_F_USO4 = 0x20;
export const TUN_F_USO6 = 0x40;

const IFREQ_SIZE = 40;
const IFNAMSIZ = 16;

export interface TunOptions {
  /** At most 15 bytes; "" lets the kernel choose, "weft%d" numbers it. */
  name: string;
  /** False: packets without virtio_net_hdr, hence no offload. Default true. */
  vnetHeader?: boolean;
  /** TCP super-packets. Default true: when the kernel has it. */
  tso?: boolean;
  /** UDP super-packets (Linux 6.2 and later). Default true: when the kernel has it. */
  uso?: boolean;
  /** For tests: another path of the clone device, and a kernel that refuses. */
  device?: string;
  ioctl?: Libc["ioctl"];
}

export interface Tun {
  /** Non-blocking, close-on-exec. */
  fd: number;
  /** As the kernel gave it. */
  name: string;
  /** Interface index, in the network namespace of the thread that opened it. */
  index: number;
  /** Every packet is preceded by VNET_HEADER_SIZE bytes. */
  vnetHeader: boolean;
  /** The kernel may hand over packets without an L4 checksum (NEEDS_CSUM), and takes them. */
  checksum: boolean;
  tso: boolean;
  uso: boolean;
}

/** A sentence that says what is wrong with a device name, or null. */
export function badInterfaceName(name: string): string | null {
  const bytes = new TextEncoder().encode(name).length;
  if (bytes >= IFNAMSIZ) return `the device name ${JSON.stringify(name)} has ${bytes} bytes: at most 15 are allowed`;
  if (name === "." || name === ".." || /[\s/:\x00-\x1f\x7f]/.test(name)) {
    return `the device name ${JSON.stringify(name)} holds a character that the kernel refuses: use letters, digits, - and _`;
  }
  return null;
}

/** Makes (or takes over a persistent) TUN device. The link is down: bring it up by netlink. Throws SysError. */
export function openTun(options: TunOptions): Tun {
  const bad = badInterfaceName(options.name);
  if (bad !== null) throw new SysError(EINVAL, "create a TUN device", bad);
  const path = options.device ?? "/dev/net/tun";
  const fd = libc.open(cstring(path), O_RDWR | O_NONBLOCK | O_CLOEXEC, 0);
  if (fd === -1) throw openError(errno(), path);
  try {
    return setUp(fd, options);
  } catch (error) {
    closeFd(fd);
    throw error;
  }
}

function openError(code: number, path: string): SysError {
  if (code === ENOENT || code === ENODEV || code === ENXIO) {
    const reason =
      "the kernel's TUN driver is not there: run `modprobe tun`, or in a container give it `--device /dev/net/tun`";
    return new SysError(code, `open ${path}`, reason);
  }
  if (code === EPERM || code === EACCES) {
    return new SysError(
      code,
      `open ${path}`,
      "permission denied: run as root, or give the container `--device /dev/net/tun`",
    );
  }
  return new SysError(code, `open ${path}`);
}

function setUp(fd: number, options: TunOptions): Tun {
  const ioctl = options.ioctl ?? libc.ioctl;
  const ifreq = buffer(IFREQ_SIZE);
  const flags = new DataView(ifreq.buffer);
  ifreq.set(new TextEncoder().encode(options.name));
  let vnetHeader = options.vnetHeader ?? true;
  flags.setUint16(IFNAMSIZ, IFF_TUN | IFF_NO_PI | (vnetHeader ? IFF_VNET_HDR : 0), true);
  let result = ioctl(fd, TUNSETIFF, ifreq);
  if (result === -1 && errno() === EINVAL && vnetHeader) {
    vnetHeader = false;
    flags.setUint16(IFNAMSIZ, IFF_TUN | IFF_NO_PI, true);
    result = ioctl(fd, TUNSETIFF, ifreq);
  }
  if (result === -1) throw attachError(errno(), options.name);
  const name = new TextDecoder().decode(ifreq.subarray(0, ifreq.indexOf(0)));

  // A persistent device may come with another header size.
  if (vnetHeader) {
    const size = new Int32Array([VNET_HEADER_SIZE]);
    check(ioctl(fd, TUNSETVNETHDRSZ, size), `set the header size of ${name}`);
  }
  const offload = vnetHeader ? setOffload(fd, ioctl, options.tso ?? true, options.uso ?? true) : 0;
  return {
    fd,
    name,
    index: interfaceIndex(name),
    vnetHeader,
    checksum: (offload & TUN_F_CSUM) !== 0,
    tso: (offload & TUN_F_TSO4) !== 0,
    uso: (offload & TUN_F_USO4) !== 0,
  };
}

function attachError(code: number, name: string): SysError {
  const what = `create the TUN device ${name}`;
  if (code === EPERM || code === EACCES) {
    return new SysError(
      code,
      what,
      "CAP_NET_ADMIN is missing: run as root, or give the container `--cap-add NET_ADMIN`",
    );
  }
  if (code === EBUSY) {
    return new SysError(code, what, "another process holds it: stop that one, or choose another name");
  }
  if (code === EINVAL) {
    return new SysError(code, what, "an interface of another kind has that name: choose another one");
  }
  return new SysError(code, what);
}

/** The offloads in use: the wanted ones, without USO, or none, whichever the kernel takes first. */
function setOffload(fd: number, ioctl: Libc["ioctl"], tso: boolean, uso: boolean): number {
  const tcp = tso ? TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 : 0;
  const udp = uso ? TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6 : 0;
  for (const flags of [tcp | udp, tcp, 0]) {
    if (ioctl(fd, TUNSETOFFLOAD, flags) === 0) return flags;
  }
  return 0;
}

/** Index of a network interface of this thread's namespace. Throws SysError (ENODEV). */
export function interfaceIndex(name: string): number {
  const socket = check(libc.socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), "open a socket");
  try {
    const ifreq = buffer(IFREQ_SIZE);
    ifreq.set(new TextEncoder().encode(name).subarray(0, IFNAMSIZ - 1));
    check(libc.ioctl(socket, SIOCGIFINDEX, ifreq), `look up the interface ${name}`);
    return new DataView(ifreq.buffer).getInt32(IFNAMSIZ, true);
  } finally {
    closeFd(socket);
  }
}

/** One packet, with its vnet header if the device has them. Bytes read, or minus errno (-EAGAIN: none there). */
export function tunRead(fd: number, into: Address, length: number): number {
  return orErrno(libc.read(fd, into, length));
}

/** Writes one packet that is gathered from `count` iovecs. Bytes written, or minus errno. */
export function tunWritev(fd: number, iov: Address, count: number): number {
  return orErrno(libc.writev(fd, iov, count));
}

/** Writes one packet that lies in one piece. Bytes written, or minus errno. */
export function tunWrite(fd: number, from: Address, length: number): number {
  return orErrno(libc.write(fd, from, length));
}
