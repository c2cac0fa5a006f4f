"""Method `split` at the server: sealed bundles come in, the latter layers are trained, queries are answered."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel

from cloister.adapters.add import add_adapter
from cloister.adapters.state import adapter_state, load_adapter_weights
from cloister.agreement.job import OpenJob
from cloister.channel.handshake import Peer
from cloister.crypto.bundle import IncomingStore
from cloister.crypto.encoding import Fields
from cloister.enclave.core import EnclaveCore
from cloister.enclave.intake import BundleIntake, Handler, Intake
from cloister.enclave.placing import is_parted
from cloister.enclave.query import QueryService
from cloister.enclave.results import Outcome
from cloister.enclave.work import train_and_score
from cloister.errors import ProtocolError
from cloister.model.anatomy import load_model, pick_device
from cloister.model.cut import Latter
from cloister.model.repacked import repack, unpack
from cloister.progress import Progress, task


class SplitService:
    """See `server.Service`."""

    parties_have_enclaves = False

    def __init__(self, opened: OpenJob, out: Path) -> None:
        self._opened = opened
        bundles = out / "bundles"
        bundles.mkdir(parents=True, exist_ok=True)
        self.incoming = IncomingStore(
            bundles,
            job_id=opened.resolved.job_id,
            public_keys=opened.parties,
            chunk_bytes=opened.resolved.job.transport.chunk_mib << 20,
            max_payload_bytes=opened.resolved.job.enclave.max_bundle_mib << 20,
        )
        self._bundles = BundleIntake(self.incoming, opened.kinds)
        self.intake: Intake = self._bundles
        self.handlers: Mapping[str, Handler] = {}
        self._latter: Latter | None = None
        self._parted = False
        self._queries: QueryService | None = None

    def met(self, peer: Peer, method: str) -> None:
        """Nothing to note."""

    def prepare(self, progress: Progress) -> None:
        job = self._opened.resolved.job
        with task(progress, "loading latter layers"):
            self._parted = is_parted(job, self._opened.resolved.model.num_bytes)
            self._latter = self._load("cpu" if self._parted else pick_device(job.enclave.device))

    def work(self, core: EnclaveCore, progress: Progress) -> Outcome:
        job, latter = self._opened.resolved.job, self._latter
        if latter is None:
            raise RuntimeError("work begins before it was prepared")
        adapted, outcome = train_and_score(
            core,
            self._bundles,
            self._opened.resolved,
            latter,
            cache_bytes=job.enclave.cache_mib << 20,
            progress=progress,
            parted=self._parted,
        )
        if self._parted:
            with task(progress, "loading latter layers"):
                latter, adapted = self._whole_again(adapted)
        unpack(latter.model)
        if job.adapter.merges:
            # Answers are then those of the merged model that `export --merge` writes, bit for bit, and come faster.
            adapted.merge_adapter()
        self._queries = QueryService(latter, job.inference, list(self._opened.parties))
        return outcome

    def _load(self, device: str) -> Latter:
        resolved = self._opened.resolved
        model = load_model(resolved.model.folder, resolved.job.model.dtype, device)
        return Latter(repack(model, resolved.job.enclave.repack and not self._parted), resolved.cut)

    def _whole_again(self, adapted: PeftModel) -> tuple[Latter, PeftModel]:
        """The tuned model on the processor, for queries: the processes that held parts of it have ended."""
        job, latter = self._opened.resolved.job, self._load("cpu")
        again = add_adapter(latter, job.adapter, first_layer=self._opened.resolved.cut, seed=job.job.seed)
        load_adapter_weights(again, adapter_state(adapted))
        self._latter = latter
        return latter, again.eval()

    def query(self, party: str, method: str, fields: Fields) -> dict[str, Any]:
        if self._queries is None:
            raise ProtocolError("the model is not trained yet", where=party)
        return self._queries(party, method, fields)
