"""What all tests of training share."""

from toy_codec import codec_once  # noqa: F401 (fixture)
