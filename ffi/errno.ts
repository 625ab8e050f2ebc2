// errno: numbers, names and the error that every call of this folder throws. The numbers are those of asm-generic, which
// x86-64 and aarch64 share.

// Index is the number. 41, 58 are holes in the kernel's numbering.
const NAMES =
  `OK EPERM ENOENT ESRCH EINTR EIO ENXIO E2BIG ENOEXEC EBADF ECHILD EAGAIN ENOMEM EACCES EFAULT ENOTBLK EBUSY
EEXIST EXDEV ENODEV ENOTDIR EISDIR EINVAL ENFILE EMFILE ENOTTY ETXTBSY EFBIG ENOSPC ESPIPE EROFS EMLINK EPIPE EDOM ERANGE
EDEADLK ENAMETOOLONG ENOLCK ENOSYS ENOTEMPTY ELOOP E41 ENOMSG EIDRM ECHRNG EL2NSYNC EL3HLT EL3RST ELNRNG EUNATCH ENOCSI
EL2HLT EBADE EBADR EXFULL ENOANO EBADRQC EBADSLT E58 EBFONT ENOSTR ENODATA ETIME ENOSR ENONET ENOPKG EREMOTE ENOLINK EADV
ESRMNT ECOMM EPROTO EMULTIHOP EDOTDOT EBADMSG EOVERFLOW ENOTUNIQ EBADFD EREMCHG ELIBACC ELIBBAD ELIBSCN ELIBMAX ELIBEXEC
EILSEQ ERESTART ESTRPIPE EUSERS ENOTSOCK EDESTADDRREQ EMSGSIZE EPROTOTYPE ENOPROTOOPT EPROTONOSUPPORT ESOCKTNOSUPPORT
EOPNOTSUPP EPFNOSUPPORT EAFNOSUPPORT EADDRINUSE EADDRNOTAVAIL ENETDOWN ENETUNREACH ENETRESET ECONNABORTED ECONNRESET
ENOBUFS EISCONN ENOTCONN ESHUTDOWN ETOOMANYREFS ETIMEDOUT ECONNREFUSED EHOSTDOWN EHOSTUNREACH EALREADY EINPROGRESS ESTALE
EUCLEAN ENOTNAM ENAVAIL EISNAM EREMOTEIO EDQUOT ENOMEDIUM EMEDIUMTYPE ECANCELED ENOKEY EKEYEXPIRED EKEYREVOKED
EKEYREJECTED EOWNERDEAD ENOTRECOVERABLE ERFKILL EHWPOISON`.split(/\s+/);

export const EPERM = 1;
export const ENOENT = 2;
export const ESRCH = 3;
export const EINTR = 4;
export const EIO = 5;
export const ENXIO = 6;
export const EBADF = 9;
export const EAGAIN = 11;
export const EACCES = 13;
export const EBUSY = 16;
export const EEXIST = 17;
export const ENODEV = 19;
export const EINVAL = 22;
export const EOVERFLOW = 75;
export const EBADFD = 77;
export const EMSGSIZE = 90;
export const EOPNOTSUPP = 95;
export const EAFNOSUPPORT = 97;
export const EADDRINUSE = 98;
export const EADDRNOTAVAIL = 99;
export const ENETUNREACH = 101;
export const ENOBUFS = 105;
export const ETIMEDOUT = 110;
export const EHOSTUNREACH = 113;

// What an operator reads. A number that is not here prints as its name alone.
const TEXT: Record<string, string> = {
  EPERM: "not permitted",
  ENOENT: "no such file or object",
  ESRCH: "no such process or entry",
  EIO: "input/output error",
  ENXIO: "no such device or address",
  EBADF: "bad file descriptor",
  EAGAIN: "would block",
  ENOMEM: "out of memory",
  EACCES: "permission denied",
  EBUSY: "in use",
  EEXIST: "exists already",
  ENODEV: "no such device",
  ENOTDIR: "not a directory",
  EINVAL: "invalid argument",
  EMFILE: "too many open files in this process: raise `ulimit -n`",
  ENFILE: "too many open files on this machine",
  ENOTTY: "not supported by this device",
  ENOSPC: "no space left",
  EROFS: "read-only file system",
  ERANGE: "out of range",
  ENOSYS: "not supported by this kernel",
  EBADFD: "the device was deleted",
  EMSGSIZE: "message too long",
  ENOPROTOOPT: "option not supported by this kernel",
  EPROTONOSUPPORT: "protocol not supported by this kernel",
  EOPNOTSUPP: "not supported by this kernel",
  EAFNOSUPPORT: "address family not supported by this kernel",
  EADDRINUSE: "address or port in use",
  EADDRNOTAVAIL: "address not on this machine",
  ENETDOWN: "network is down",
  ENETUNREACH: "network unreachable",
  ENOBUFS: "no buffer space",
  ETIMEDOUT: "timed out",
  ECONNREFUSED: "connection refused",
  EHOSTUNREACH: "host unreachable",
};

/** "ENOENT" for 2; "E999" for a number that has no name. */
export function errnoName(errno: number): string {
  return NAMES[errno] ?? `E${errno}`;
}

/** A system call that failed. `message` is one sentence: what was tried, and why it failed. */
export class SysError extends Error {
  override readonly name = "SysError";
  readonly errno: number;
  /** "ENOENT". */
  readonly code: string;

  constructor(errno: number, what: string, reason?: string) {
    const code = errnoName(errno);
    const text = reason ?? TEXT[code];
    super(text === undefined ? `${what}: ${code}` : `${what}: ${text} (${code})`);
    this.errno = errno;
    this.code = code;
  }
}
