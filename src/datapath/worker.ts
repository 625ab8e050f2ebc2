// Entry of the datapath's Workers. Whatever goes wrong in it reaches the main thread as one sentence.
import { workerData } from "node:worker_threads";
import { Helper } from "./crew.ts";
import { Loop } from "./loop.ts";
import type { HelperSetup, Reply, SenderSetup, WorkerSetup } from "./messages.ts";
import { DeviceGone } from "./receive.ts";
import { Sender } from "./sender.ts";

const setup = workerData as WorkerSetup | SenderSetup | HelperSetup;
const say = (reply: Reply) => setup.port.postMessage(reply);

try {
  if (setup.role === "helper") {
    const helper = new Helper(setup);
    say({ type: "ready", crew: null });
    helper.run();
  } else {
    const loop = setup.role === "sender" ? new Sender(setup) : new Loop(setup);
    say({ type: "ready", crew: loop.crew?.setup ?? null });
    loop.run();
    say({ type: "closed" });
  }
} catch (error) {
  if (error instanceof DeviceGone) say({ type: "fatal", reason: "the TUN device was deleted" });
  else say({ type: "fatal", reason: `the datapath failed: ${error instanceof Error ? error.message : error}` });
}
