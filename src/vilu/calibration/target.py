"""The target of a calibration, and checks for impossible targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, get_args

from pydantic import ConfigDict, SerializerFunctionWrapHandler, model_serializer

from vilu.calibration.methods import ClusterRisk, Method, RowsMethod, SetMethod
from vilu.calibration.shares import check_shares
from vilu.errors import UsageError
from vilu.validation import checked_fields, require_at_least, require_between


@checked_fields
@dataclasses.dataclass(frozen=True)
class Target:
    """Target of a calibration: the requested guarantees.

    Attributes:
        max_risk: Largest error rate among accepted answers. None means that no bound is requested.
            If ``min_coverage`` is None too, no rule is made.
        min_coverage: Smallest share of answers to accept. None means any share.
        confidence: Confidence of the guarantee, 1 - delta.
        method: "ltt", "crc" or "selection", as in ``vilu.certify``, or "anytime" for labels
            requested by ``vilu next`` and ``vilu triage``.
        per_class: Whether every predicted class with enough rows has a separate threshold.
        label_sets: "lac" or "aps" (``vilu.calibration.label_sets``). None means no label sets.
        max_miss: Largest share of label sets without the right label.
        outside_share: Expected share of pictures outside all classes. None means the share among
            the calibration rows.
        class_shares: Expected share for each class, by name, among the pictures within the classes.
            None means the shares among the calibration rows.
        cluster_risk: "majority" or "ratio", as in ``vilu.certify_clusters``. None means that the
            guarantee is about single rows.
        largest_cluster: For "ratio", the largest number of rows in a cluster under the guarantee.
            None means the size of the largest calibration cluster.

    Examples:
        >>> import vilu
        >>> target = vilu.Target(max_risk=0.05)  # "at most 5 % of the accepted are wrong"
        >>> target.confidence
        0.95
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    max_risk: float | None = None
    min_coverage: float | None = None
    confidence: float = 0.95
    method: Method = "ltt"
    per_class: bool = False
    label_sets: SetMethod | None = None
    max_miss: float = 0.1
    outside_share: float | None = None
    class_shares: Mapping[str, float] | None = None
    cluster_risk: ClusterRisk | None = None
    largest_cluster: int | None = None

    @model_serializer(mode="wrap")
    def _fields_to_save(self, fields_of: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the fields to save, without unused fields about clusters."""
        all_fields = fields_of(self)
        return self._without_unused_fields(all_fields)

    def facts(self) -> dict[str, Any]:
        """Return the fields as a dictionary, for digests."""
        all_fields = dataclasses.asdict(self)
        return self._without_unused_fields(all_fields)

    def _without_unused_fields(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Remove the fields about clusters from ``fields`` if there is no cluster risk."""
        # Earlier versions did not have these fields. New fields would change the digests of old
        # targets, and the fingerprints of calibrations with these targets.
        if self.cluster_risk is None:
            fields.pop("cluster_risk", None)
            fields.pop("largest_cluster", None)
        return fields

    @property
    def has_rule(self) -> bool:
        """Whether the target asks for a rule, not only for probabilities or label sets."""
        return self.max_risk is not None or self.min_coverage is not None

    @property
    def states_shares(self) -> bool:
        """Whether the guarantee must hold for stated shares, not for the shares among the rows."""
        return self.outside_share is not None or self.class_shares is not None

    def check_rule(self, *, grouped: bool) -> None:
        """Refuse a target that no rule can guarantee.

        ``grouped`` says whether each group has a separate threshold.
        """
        if not self.has_rule:
            raise UsageError("what is to be guaranteed? Give max_risk, min_coverage or both.")
        if self.max_risk is not None:
            require_between("max_risk", self.max_risk)
        if self.min_coverage is not None:
            require_between("min_coverage", self.min_coverage, "(0, 1]")
        require_between("confidence", self.confidence)
        if self.method == "anytime":
            rows_methods = ", ".join(get_args(RowsMethod))
            raise UsageError(
                f"method must be one of {rows_methods} if all labels are there "
                'already. Got "anytime" instead, which is for labels that arrive one by one: '
                "vilu.Selective has next_labels, and calibrate with the method anytime. The "
                "commands are `vilu next` and `vilu calibrate --method anytime`."
            )
        if self.method == "selection":
            has_only_max_risk = self.max_risk is not None and self.min_coverage is None
            if grouped or not has_only_max_risk:
                raise UsageError(
                    "selection takes a max_risk, and neither a min_coverage nor a threshold per "
                    "class."
                )
        self.check_shares(grouped=grouped)
        self.check_clusters(grouped=grouped)

    def risk_of_anytime(self) -> float:
        """Return the ``max_risk`` of a target with the method "anytime".

        A target is refused if ``max_risk`` is missing, if a number is out of range, or if the
        target has options that "anytime" does not allow.
        """
        # the same target without the options that "anytime" does not allow
        allowed_target = Target(
            max_risk=self.max_risk,
            confidence=self.confidence,
            method="anytime",
            per_class=self.per_class,
        )
        if self.max_risk is None or self != allowed_target:
            raise UsageError(
                "anytime needs a max_risk, and allows no other target but confidence and per_class "
                "beside it."
            )
        require_between("max_risk", self.max_risk)
        require_between("confidence", self.confidence)
        return self.max_risk

    def check_clusters(self, *, grouped: bool) -> None:
        """Refuse a cluster risk together with options that do not allow clusters."""
        if self.largest_cluster is not None:
            require_at_least("largest_cluster", self.largest_cluster, 1)
            if self.cluster_risk != "ratio":
                raise UsageError('largest_cluster is for the cluster_risk "ratio". Leave it out.')
        if self.cluster_risk is None:
            return
        has_only_max_risk = self.max_risk is not None and self.min_coverage is None
        is_allowed = has_only_max_risk and self.method == "ltt" and not self.states_shares
        if not is_allowed or grouped:
            raise UsageError(
                "a cluster_risk takes a max_risk and the method ltt, and no min_coverage, groups "
                "or shares."
            )

    def check_shares(self, *, grouped: bool) -> None:
        """Refuse impossible shares, and shares together with options that do not allow shares."""
        check_shares(self.outside_share, self.class_shares)
        if not self.states_shares:
            return
        if self.max_risk is None or self.method != "ltt" or grouped:
            raise UsageError("stated shares take a max_risk, the method ltt, and no groups.")
