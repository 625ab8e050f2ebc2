// The lab's survivor. It reads paths of network namespaces from standard input, one a line, opens each and answers "held".
// When the input ends - the lab closed, or its process died, however it died - it kills every process in those namespaces
// and ends, and with its descriptors the last hold on the namespaces and their interfaces is gone.
import { openNetns } from "../ffi/netns.ts";
import { killProcessesIn, netnsId } from "./namespaces.ts";

for (const signal of ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"] as const) process.on(signal, () => {});

const ids = new Set<string>();
for await (const path of console) {
  // The end of the input comes as an empty line.
  if (path === "") continue;
  ids.add(netnsId(openNetns(path)));
  process.stdout.write("held\n");
}
await killProcessesIn(ids);
