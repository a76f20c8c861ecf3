"""Runs the transitions: the one place where jobs are read and written.

Whatever a claim raises means *unknown*: the server may have applied it. So a claim that failed is looked up by its
token before anything else is claimed. Bulk writes are not retried by the driver; ours are idempotent and are retried
by the loops that call them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from bson import ObjectId
from bson.errors import InvalidDocument, InvalidId
from pymongo import MongoClient, ReturnDocument, UpdateMany, UpdateOne
from pymongo.collection import Collection
from pymongo.errors import BulkWriteError, DuplicateKeyError, OperationFailure, PyMongoError

from supervisor.errors import DuplicateJob, InvalidJob, StoreUnavailable
from supervisor.job import DEFAULT_MEMORY_MB
from supervisor.states import Status
from supervisor.store import schema, transitions
from supervisor.store.client import first_failure, is_about_document, named
from supervisor.store.transitions import Demand, Move, Owner

Document = dict[str, Any]
Observe = Callable[[str, float, bool], None]

Answer = TypeVar("Answer")

BAD_VALUE = 2
_TOO_LARGE_CODES = {10334, 17419, 17420}
_IDS_WITH_TEXT = (ObjectId, str, int)
_STORY_FREE = {"logs": False, "env": False, "python_args": False}
_TRACES = {"status": True, "attempts": True, "lock.token": True}


def ignore(operation: str, seconds: float, succeeded: bool) -> None:
    """Observes nothing."""


def by_index(name: str, ask: Callable[[str | None], Answer]) -> Answer:
    """Asks by an index; without it where nobody has made it yet, or while a newer version makes it anew."""
    try:
        return ask(name)
    except OperationFailure as error:
        if error.code != BAD_VALUE:
            raise
        return ask(None)


def possible_ids(job_id: Any) -> list[Any]:
    """The values of `_id` that this text can stand for: other programs choose their own."""
    candidates: list[Any] = [job_id]
    if isinstance(job_id, str):
        with suppress(InvalidId):
            candidates.insert(0, ObjectId(job_id))
        if job_id.lstrip("-").isdigit() and len(job_id) < 19:
            candidates.append(int(job_id))
    return candidates


class JobStore:
    """The collection of jobs. Every method raises `StoreUnavailable` when MongoDB cannot be reached."""

    def __init__(
        self, client: MongoClient[Document], db_name: str, collection_name: str, *, uri: str, observe: Observe = ignore
    ) -> None:
        self.collection: Collection[Document] = client[db_name][collection_name]
        self._uri = uri
        self._observe = observe

    @contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """Times one operation and names its errors."""
        began = time.perf_counter()
        succeeded = False
        try:
            yield
            succeeded = True
        except (DuplicateKeyError, BulkWriteError):
            succeeded = True  # the server has answered; the caller makes sense of it
            raise
        except PyMongoError as error:
            raise named(error, self._uri) from error
        finally:
            self._observe(name, time.perf_counter() - began, succeeded)

    def ensure_indexes(self, *, by_queue: bool = False) -> None:
        with self.operation("ensure_indexes"):
            schema.ensure_indexes(self.collection.database, self.collection.name, by_queue=by_queue)

    def refuse_duplicates(self) -> int:
        """Fails pending jobs that share a unique key with an earlier one, and makes the index that forbids it.

        Other programs may have inserted them before the index was there.
        """
        database, name = self.collection.database, self.collection.name
        with self.operation("refuse"):
            if schema.UNIQUE_INDEX not in schema.missing_indexes(database, name):
                return 0
            refused = 0
            for key in self.collection.aggregate(transitions.SHARED_UNIQUE_KEYS, allowDiskUse=True):
                first, *others = key["ids"]
                why = transitions.invalid(f"unique_key: {key['_id']!r} is taken by job {first}")
                condition = {"_id": {"$in": others}, "status": Status.PENDING.value}
                refused += self.collection.update_many(condition, why).modified_count
            schema.ensure_indexes(database, name)
        return refused

    # -- producers ----------------------------------------------------------------------------------------------------

    def insert(self, document: Document) -> Any:
        """Inserts one job and returns its id; raises `DuplicateJob` when its unique key is taken."""
        try:
            with self.operation("insert"):
                return self.collection.insert_one(document).inserted_id
        except DuplicateKeyError:
            raise self.duplicate(document) from None
        except (InvalidDocument, OverflowError, UnicodeEncodeError) as error:
            raise InvalidJob("document", str(error)) from None

    def insert_many(self, documents: Sequence[Document]) -> list[DuplicateJob]:
        """Inserts jobs in bulk; returns the refusals of those whose unique key is taken."""
        try:
            with self.operation("insert_many"):
                self.collection.insert_many(documents, ordered=False)
        except BulkWriteError as error:
            problems = error.details.get("writeErrors", [])
            others = [problem for problem in problems if problem.get("code") != 11000]
            if others:
                raise InvalidJob("document", str(others[0].get("errmsg"))) from None
            return [self.duplicate(documents[problem["index"]]) for problem in problems]
        return []

    def duplicate(self, document: Mapping[str, Any]) -> DuplicateJob:
        key = str(document.get("unique_key"))
        owner = self.holder_of(key)
        return DuplicateJob(key, str(owner["_id"]) if owner else None)

    def holder_of(self, unique_key: str) -> Document | None:
        """The pending or running job with this key."""
        live = [Status.PENDING.value, Status.RUNNING.value]
        with self.operation("find"):
            return self.collection.find_one({"unique_key": unique_key, "status": {"$in": live}})

    # -- workers ------------------------------------------------------------------------------------------------------

    def claim(
        self, owner: Owner, token: str, demand: Demand, lease_seconds: float, *, sure_mb: int | None = None
    ) -> Document | None:
        """Locks the first due job, atomically, or returns None. One of up to `sure_mb` counts as started."""
        index = schema.CLAIM_BY_QUEUE_INDEX if demand.queues else schema.CLAIM_INDEX
        with self.operation("claim"):
            return by_index(
                index,
                lambda hint: self.collection.find_one_and_update(
                    transitions.due(demand),
                    transitions.claim_update(owner, token, lease_seconds, sure_mb=sure_mb),
                    sort=schema.CLAIM_SORT,
                    hint=hint,
                    return_document=ReturnDocument.AFTER,
                ),
            )

    def claim_ahead(self, owner: Owner, token: str, demand: Demand, lease_seconds: float, count: int) -> list[Document]:
        """Locks up to `count` due jobs, in the order of running; another claimer may take some of them first.

        Together they reserve at most `demand.limit_mb`, unless the first one alone does.
        """
        index = schema.CLAIM_BY_QUEUE_INDEX if demand.queues else schema.CLAIM_INDEX
        with self.operation("claim"):
            found = by_index(
                index,
                lambda hint: list(
                    self.collection.find(
                        transitions.due(demand),
                        {"_id": True, "required_memory": True},
                        sort=schema.CLAIM_SORT,
                        hint=hint,
                        limit=count,
                    )
                ),
            )
            order = [document["_id"] for document in _within(found, demand.limit_mb)]
            ids = [job_id for job_id in order if isinstance(job_id, _IDS_WITH_TEXT)]
            if not ids or len(ids) < len(order):
                return []  # an id that has no text form: such jobs are claimed one by one
            pending = {"_id": {"$in": ids}, "status": Status.PENDING.value}
            self.collection.update_many(pending, transitions.claim_update(owner, token, lease_seconds, ahead=True))
            locked = self.held_of(ids, owner.worker)
        place = {job_id: position for position, job_id in enumerate(ids)}
        return sorted(locked, key=lambda document: place[document["_id"]])

    def held_of(self, ids: Sequence[Any], worker: str) -> list[Document]:
        """Those of the jobs that this worker holds."""
        condition = {"_id": {"$in": list(ids)}, "status": Status.RUNNING.value, "lock.worker": worker}
        return list(self.collection.find(condition))

    def held_by(self, worker: str) -> list[Document]:
        """Every job that this worker holds: asked after a claim whose answer was lost."""
        with self.operation("find_claim"):
            condition = {"status": Status.RUNNING.value, "lock.worker": worker}
            return self._running(condition)

    def claimed_with(self, token: str) -> Document | None:
        """The job that a claim with this token took, if it did: asked after a claim whose answer was lost."""
        with self.operation("find_claim"):
            found = self._running({"status": Status.RUNNING.value, "lock.token": token}, limit=1)
            return found[0] if found else None

    def _running(self, condition: Document, projection: Document | None = None, *, limit: int = 0) -> list[Document]:
        return by_index(
            schema.LEASE_INDEX,
            lambda hint: list(self.collection.find(condition, projection, hint=hint, limit=limit)),
        )

    def claim_or_refuse(
        self, owner: Owner, token: str, demand: Demand, lease_seconds: float, error: str
    ) -> Document | None:
        """Locks the first due job, or fails it when the server cannot lock it (a document at the size limit).

        Asked after a claim that was refused: by now another worker may have failed that job, and the first is a
        sound one.
        """
        index = schema.CLAIM_BY_QUEUE_INDEX if demand.queues else schema.CLAIM_INDEX
        with self.operation("refuse"):
            head = by_index(
                index,
                lambda hint: self.collection.find_one(
                    transitions.due(demand), {"_id": True}, sort=schema.CLAIM_SORT, hint=hint
                ),
            )
            if head is None:
                return None
            condition = {"_id": head["_id"], "status": Status.PENDING.value}
            update = transitions.claim_update(owner, token, lease_seconds)
            try:
                return self.collection.find_one_and_update(condition, update, return_document=ReturnDocument.AFTER)
            except OperationFailure as failure:
                if not is_about_document(failure):
                    raise
            fields = {"status": Status.FAILED.value, "reason": "invalid_job", "error": error, "exit_code": None}
            try:
                self.collection.update_one(condition, {"$set": fields})
            except OperationFailure as failure:
                if failure.code not in _TOO_LARGE_CODES:
                    raise
                self.collection.update_one(condition, {"$set": {"status": Status.FAILED.value}})
            return None

    def apply(self, move: Move, operation: str) -> bool:
        """Makes one move; False: its condition did not hold, and nothing was written."""
        with self.operation(operation):
            return self.collection.update_one(move.filter, move.update).matched_count == 1

    def apply_all(self, moves: Sequence[Move], operation: str) -> list[bool]:
        """Makes moves of different jobs in one round trip; whether each one's condition held.

        Where the server refuses some of them, the others are made, and the error is that of the first refused.
        """
        if len(moves) == 1:
            return [self.apply(moves[0], operation)]
        # Statements about many are not recorded for a retry by the driver, which costs as much as half of a write; and
        # a move that was made already does not match again, so they are repeated here.
        completions = [move for move in moves if move.completion is not None]
        others = [move for move in moves if move.completion is None]
        merged = [transitions.together(completions), *others] if completions else others
        try:
            matched = self._write_all([UpdateMany(move.filter, move.update) for move in merged], operation)
        except StoreUnavailable:
            matched = self._write_all([UpdateOne(move.filter, move.update) for move in moves], operation)
        if matched == len(moves):
            return [True] * len(moves)
        return [self.was_applied(move) for move in moves]  # made at the first try, or somebody lost a job

    def _write_all(self, statements: Sequence[UpdateMany | UpdateOne], operation: str) -> int:
        """How many of them matched."""
        with self.operation(operation):
            try:
                return self.collection.bulk_write(statements, ordered=False).matched_count
            except BulkWriteError as error:
                raise first_failure(error) or error from None

    def was_applied(self, move: Move) -> bool:
        """Whether the document looks as this outcome leaves it: finished by the same attempt, held by nobody."""
        with self.operation("find"):
            document = self.collection.find_one({"_id": move.filter["_id"]}, _TRACES)
        attempt = next((stage["$set"].get("attempts") for stage in move.update if "$set" in stage), None)
        return document is not None and document.get("lock") is None and document.get("attempts") == attempt

    # -- people -------------------------------------------------------------------------------------------------------

    def find(self, job_id: Any, projection: Mapping[str, Any] | None = None) -> Document | None:
        candidates = possible_ids(job_id)
        with self.operation("find"):
            found = list(self.collection.find({"_id": {"$in": candidates}}, projection))
        return min(found, key=lambda document: candidates.index(document["_id"]), default=None)

    def change(self, move: Move, operation: str) -> bool:
        """Makes a move that a person asked for; raises `DuplicateJob` when the unique key is taken meanwhile."""
        try:
            return self.apply(move, operation)
        except DuplicateKeyError:
            document = self.find(move.filter["_id"]) or {}
            raise self.duplicate(document) from None

    # -- the keeper ---------------------------------------------------------------------------------------------------

    def renew(self, supervisor_id: str, tokens: Sequence[str], lease_seconds: float) -> list[str]:
        """Renews the leases of these claims; returns the tokens that are no longer held."""
        move = transitions.renew(supervisor_id, tokens, lease_seconds)
        with self.operation("renew"):
            result = by_index(
                schema.LEASE_INDEX, lambda hint: self.collection.update_many(move.filter, move.update, hint=hint)
            )
            if result.matched_count >= len(tokens):
                return []
            found = self._running(move.filter, {"lock.token": True})
            kept = {document["lock"]["token"] for document in found}
        return [token for token in tokens if token not in kept]

    def lose(self, condition: Document, why: str, *, at_most: int = 1000) -> list[Document]:
        """Takes back the jobs that match, one by one; returns them as they are now."""
        lost: list[Document] = []
        projection = {"_id": True, "lock.token": True, "updated_at": True}
        with self.operation("find_lost"):
            found = self._running(condition, projection, limit=at_most)
        for document in found:
            lock = document.get("lock")
            token = lock.get("token") if isinstance(lock, Mapping) else None
            exactly = {**condition, "_id": document["_id"]}
            if token is None:
                exactly["updated_at"] = document.get("updated_at")
            else:
                exactly["lock.token"] = token
            try:
                after = self._reclaim(transitions.lose(exactly, why))
            except StoreUnavailable as error:
                if not is_refusal(error):
                    raise
                after = self._reclaim(transitions.lose_bare(exactly))
            if after is not None:
                lost.append(after)
        return lost

    def _reclaim(self, move: Move) -> Document | None:
        with self.operation("reclaim"):
            return self.collection.find_one_and_update(
                move.filter, move.update, projection=_STORY_FREE, return_document=ReturnDocument.AFTER
            )

    def cancel_requests(self, supervisor_id: str) -> list[str]:
        """Tokens of this supervisor's jobs that someone asked to cancel."""
        condition = {
            "status": Status.RUNNING.value,
            "lock.supervisor_id": supervisor_id,
            "cancel_requested": True,
        }
        with self.operation("find_cancelled"):
            found = self._running(condition, {"lock.token": True})
            return [document["lock"]["token"] for document in found]

    def adopt(self) -> int:
        """Gives documents of other programs the defaults that the order of running needs."""
        orphans = transitions.adopt_without_status()
        with self.operation("adopt"):
            try:
                adopted = self._update(orphans, schema.LIST_INDEX)
            except DuplicateKeyError:  # one of them has the unique key of another job
                adopted = self._adopt_one_by_one(orphans)
            return adopted + self._update(transitions.adopt(), schema.CLAIM_INDEX)

    def refuse_never_due(self) -> int:
        """Fails what no claim would ever find; reads the keys of all pending jobs."""
        with self.operation("refuse"):
            return sum(self._update(move, schema.CLAIM_INDEX) for move in transitions.refuse_never_due())

    def _update(self, move: Move, index: str) -> int:
        return by_index(
            index, lambda hint: self.collection.update_many(move.filter, move.update, hint=hint).modified_count
        )

    def _adopt_one_by_one(self, move: Move) -> int:
        adopted = 0
        for document in self.collection.find(move.filter, {"_id": True}).limit(1000):
            exactly = {**move.filter, "_id": document["_id"]}
            try:
                adopted += self.collection.update_one(exactly, move.update).modified_count
            except DuplicateKeyError:
                self.collection.update_one(exactly, transitions.invalid("unique_key: another job has the same"))
        return adopted

    def remove_finished(self, older_than_days: float, *, at_most: int = 1000) -> int:
        """Removes finished jobs of that age, and their output."""
        age = {"$subtract": ["$$NOW", round(older_than_days * 86_400_000)]}
        ended = {"$ifNull": ["$finished_at", "$updated_at", "$$NOW"]}
        final = [status.value for status in Status if status.is_final]
        condition = {
            "status": {"$in": final},
            "$expr": {"$and": [{"$eq": [{"$type": ended}, "date"]}, {"$lt": [ended, age]}]},
        }
        with self.operation("retention"):
            ids = [document["_id"] for document in self.collection.find(condition, {"_id": True}).limit(at_most)]
            if ids:
                self.collection.database[schema.OUTPUT_COLLECTION].delete_many({"job_id": {"$in": ids}})
                self.collection.delete_many({"_id": {"$in": ids}, "status": {"$in": final}})
        return len(ids)


def _within(documents: Sequence[Document], limit_mb: int | None) -> Sequence[Document]:
    """The first of them, as far as their memory stays together within the limit; at least one."""
    total = 0.0
    for count, document in enumerate(documents):
        size = document.get("required_memory", DEFAULT_MEMORY_MB)
        total += size if isinstance(size, int | float) else DEFAULT_MEMORY_MB
        if limit_mb is not None and not total <= limit_mb and count:
            return documents[:count]
    return documents


def is_unauthorized(error: StoreUnavailable) -> bool:
    """Whether MongoDB knows this user and does not allow this."""
    cause = error.__cause__
    return isinstance(cause, OperationFailure) and cause.code == 13


def is_refusal(error: StoreUnavailable) -> bool:
    """Whether MongoDB is there and refuses this very write: it will refuse it again."""
    cause = error.__cause__
    return isinstance(cause, PyMongoError) and is_about_document(cause)
