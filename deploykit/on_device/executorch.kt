// The engine on ExecuTorch. app/build.gradle.kts: implementation("org.pytorch:executorch-android:VERSION"), the release that
// model.json names; its AAR holds the XNNPACK backend and the portable and quantized kernels.
package ondevice

import android.content.Context
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

class Engine(context: Context, private val facts: Facts) : AutoCloseable {
    private val module = Module.load(engineFile(context, facts).absolutePath)

    fun infer(inputs: Map<String, FloatArray>): Map<String, FloatArray> {
        val values = facts.inputs.map { EValue.from(Tensor.fromBlob(inputs.getValue(it.name), it.shape)) }
        val found = module.forward(*values.toTypedArray())
        return facts.outputs.mapIndexed { i, port -> port.name to found[i].toTensor().dataAsFloatArray }.toMap()
    }

    override fun close() = module.destroy()
}
