"""Keys of callers: only the digest of a secret is kept."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    # SQLite has no time of its own: text in UTC, as its date functions take it.
    time = sa.DateTime(timezone=True) if op.get_context().dialect.name == "postgresql" else sa.Text()
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text(), primary_key=True),  # begins with its time: in the order of making
        sa.Column("secret_sha256", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),  # words
        sa.Column("tools", sa.Text(), nullable=False),  # words, globs
        sa.Column("limit_class", sa.Text(), nullable=False),
        sa.Column("created_at", time, nullable=False),
        sa.Column("expires_at", time),
        sa.Column("revoked_at", time),
    )
