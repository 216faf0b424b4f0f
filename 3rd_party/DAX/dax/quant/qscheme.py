"""Which values share one scale. Every scheme is symmetric: zero is stored as zero, there is no offset."""

from enum import Enum


class QScheme(Enum):
    PER_TENSOR_SYMMETRIC = "per_tensor_symmetric"  # one scale for all
    PER_TOKEN_SYMMETRIC = "per_token_symmetric"  # activations [..., K]: one for each row of K values
    PER_CHANNEL_SYMMETRIC = "per_channel_symmetric"  # weights [out, in]: one for each output channel


per_tensor_symmetric = QScheme.PER_TENSOR_SYMMETRIC
per_token_symmetric = QScheme.PER_TOKEN_SYMMETRIC
per_channel_symmetric = QScheme.PER_CHANNEL_SYMMETRIC
