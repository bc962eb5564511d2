"""What all tests share: property tests take no notice of how busy the machine is."""

from hypothesis import settings

settings.register_profile("steerllm", deadline=None, max_examples=50)
settings.load_profile("steerllm")
